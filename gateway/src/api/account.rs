//! The caller's own keys and tokens: `/v1/keys`, `/v1/tokens`; and the same for administrators' use on others.

use super::{
    Rooms,
    caller::{Account, Asked, Body, Holder, Named},
    failure::{Answer, Failure},
};
use crate::{
    ssh::parse_key,
    store::{LastKey, UserRecord},
};
use axum::{Json, extract::State, http::StatusCode};
use jiff::{SignedDuration, Timestamp};
use mlad::api::{ErrorCode, NewKey, NewToken, SshKey, Token};
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::{router::OpenApiRouter, routes};

/// How long a token works that names no time.
const TOKEN_LIFE: u64 = 90 * 24 * 3600;
/// Longest life of a token, in seconds.
const MAX_TOKEN_LIFE: u64 = 366 * 24 * 3600;
/// Longest label, in characters.
const MAX_LABEL: usize = 128;

pub(super) fn routes() -> OpenApiRouter<Rooms> {
    OpenApiRouter::new()
        .routes(routes!(list_keys, add_key))
        .routes(routes!(remove_key))
        .routes(routes!(list_tokens, add_token))
        .routes(routes!(remove_token))
}

/// The caller's SSH keys.
#[utoipa::path(get, path = "/v1/keys", tag = "account", responses((status = 200, body = Vec<SshKey>)))]
async fn list_keys(State(state): State<Rooms>, me: Account) -> Answer<Json<Vec<SshKey>>> {
    Ok(Json(state.store.keys_of(me.user.id).await?))
}

/// Adds an SSH key of the caller. An administrator does this outside containers only.
#[utoipa::path(post, path = "/v1/keys", tag = "account", request_body = NewKey, responses((status = 201, body = SshKey)))]
async fn add_key(
    State(state): State<Rooms>,
    Holder(me): Holder,
    Body(key): Body<NewKey>,
) -> Answer<(StatusCode, Json<SshKey>)> {
    put_key(&state, &me.identity.user, &me.user, &key).await
}

/// How a key is to be removed.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct KeyRemoval {
    /// Whether it may be the last one that lets the caller in.
    #[serde(default)]
    force: bool,
}

/// Removes an SSH key of the caller, and ends the connections it let in. An administrator does this outside
/// containers only.
#[utoipa::path(delete, path = "/v1/keys/{fingerprint}", tag = "account", params(("fingerprint" = String, Path), KeyRemoval), responses((status = 204)))]
async fn remove_key(
    State(state): State<Rooms>,
    Holder(me): Holder,
    Named(fingerprint): Named<String>,
    Asked(KeyRemoval { force }): Asked<KeyRemoval>,
) -> Answer<StatusCode> {
    take_key(&state, &me.identity.user, &me.user, &fingerprint, LastKey::may_go_if(force)).await
}

/// The caller's tokens, without their secrets.
#[utoipa::path(get, path = "/v1/tokens", tag = "account", responses((status = 200, body = Vec<Token>)))]
async fn list_tokens(State(state): State<Rooms>, me: Account) -> Answer<Json<Vec<Token>>> {
    Ok(Json(state.store.tokens(me.user.id).await?))
}

/// Makes a token of the caller; its secret is in this answer alone. An administrator does this outside containers
/// only.
#[utoipa::path(post, path = "/v1/tokens", tag = "account", request_body = NewToken, responses((status = 201, body = Token)))]
async fn add_token(
    State(state): State<Rooms>,
    Holder(me): Holder,
    Body(token): Body<NewToken>,
) -> Answer<(StatusCode, Json<Token>)> {
    put_token(&state, &me.identity.user, &me.user, &token).await
}

/// Revokes a token of the caller. An administrator does this outside containers only.
#[utoipa::path(delete, path = "/v1/tokens/{id}", tag = "account", params(("id" = i64, Path)), responses((status = 204)))]
async fn remove_token(State(state): State<Rooms>, Holder(me): Holder, Named(id): Named<i64>) -> Answer<StatusCode> {
    take_token(&state, &me.identity.user, &me.user, id).await
}

pub(super) async fn put_key(
    state: &Rooms,
    by: &str,
    user: &UserRecord,
    key: &NewKey,
) -> Answer<(StatusCode, Json<SshKey>)> {
    let key = parse_key(key)?;
    let detail = match key.expires_at {
        Some(time) if time <= Timestamp::now() => {
            let message = format!("a key that expires {time} would let nobody in");
            return Err(Failure::new(ErrorCode::BadRequest, message).hint("name a time to come, or none"));
        }
        Some(time) => format!("{}, expires {time}", key.fingerprint),
        None => key.fingerprint.clone(),
    };
    state.store.audit(by, "key.add", &user.name, Some(&detail)).await?;
    Ok((StatusCode::CREATED, Json(state.store.add_key(user.id, &key).await?)))
}

pub(super) async fn take_key(
    state: &Rooms,
    by: &str,
    user: &UserRecord,
    fingerprint: &str,
    last: LastKey,
) -> Answer<StatusCode> {
    state.store.audit(by, "key.remove", &user.name, Some(fingerprint)).await?;
    state.store.remove_key(user.id, fingerprint, last).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn put_token(
    state: &Rooms,
    by: &str,
    user: &UserRecord,
    token: &NewToken,
) -> Answer<(StatusCode, Json<Token>)> {
    let label = token.label.trim();
    if label.is_empty() || label.chars().count() > MAX_LABEL || label.chars().any(char::is_control) {
        let message = format!("a token's label is one line of 1 to {MAX_LABEL} characters");
        return Err(Failure::new(ErrorCode::BadRequest, message));
    }
    let life = token.valid_seconds.unwrap_or(TOKEN_LIFE);
    let expires_at = expiry(life, MAX_TOKEN_LIFE)?;
    state.store.audit(by, "token.add", &user.name, Some(label)).await?;
    Ok((StatusCode::CREATED, Json(state.store.add_token(user.id, label, expires_at).await?)))
}

pub(super) async fn take_token(state: &Rooms, by: &str, user: &UserRecord, id: i64) -> Answer<StatusCode> {
    state.store.audit(by, "token.remove", &user.name, Some(&id.to_string())).await?;
    state.store.remove_token(user.id, id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// When something ends that is to last so many seconds.
pub(super) fn expiry(seconds: u64, most: u64) -> Answer<Timestamp> {
    if seconds == 0 || seconds > most {
        return Err(Failure::new(ErrorCode::BadRequest, format!("it can be valid for 1 to {most} seconds")));
    }
    let life = SignedDuration::from_secs(i64::try_from(seconds).unwrap_or(i64::MAX));
    Ok(Timestamp::now().saturating_add(life).unwrap_or(Timestamp::MAX))
}
