//! Certificate authorities for users, and revoked certificates: `/v1/admin/authorities`, `/v1/admin/revocations`.

use super::{
    Rooms,
    caller::{Admin, Body, Named},
    failure::{Answer, Failure},
};
use crate::ssh::parse_key;
use axum::{Json, extract::State, http::StatusCode};
use mlad::api::{CertificateAuthority, ErrorCode, NewCertificateAuthority, NewKey, NewRevocation, Revocation, Revoked};
use utoipa_axum::{router::OpenApiRouter, routes};

/// Longest key id, in bytes.
const MAX_KEY_ID: usize = 1024;
/// Longest fingerprint, in bytes.
const MAX_FINGERPRINT: usize = 128;

pub(super) fn routes() -> OpenApiRouter<Rooms> {
    OpenApiRouter::new()
        .routes(routes!(list_authorities, add_authority))
        .routes(routes!(remove_authority))
        .routes(routes!(list_revocations, add_revocation))
        .routes(routes!(remove_revocation))
}

/// The certificate authorities that are trusted.
#[utoipa::path(get, path = "/v1/admin/authorities", tag = "admin", responses((status = 200, body = Vec<CertificateAuthority>)))]
async fn list_authorities(State(state): State<Rooms>, _: Admin) -> Answer<Json<Vec<CertificateAuthority>>> {
    Ok(Json(state.store.authorities().await?))
}

/// Trusts a certificate authority: of everybody, or of one user.
#[utoipa::path(post, path = "/v1/admin/authorities", tag = "admin", request_body = NewCertificateAuthority, responses((status = 201, body = CertificateAuthority)))]
async fn add_authority(
    State(state): State<Rooms>,
    Admin(by): Admin,
    Body(new): Body<NewCertificateAuthority>,
) -> Answer<(StatusCode, Json<CertificateAuthority>)> {
    let NewCertificateAuthority { public_key, label, user } = new;
    let key = parse_key(&NewKey { public_key, label, expires_at: None })?;
    let user = match &user {
        Some(name) => Some(state.store.user_by_name(name).await?),
        None => None,
    };
    let whom = user.as_ref().map_or("everybody", |user| user.name.as_str());
    state.store.audit(&by.user, "authority.add", &key.fingerprint, Some(&format!("for {whom}"))).await?;
    let added = state.store.add_authority(&key, user.map(|user| user.id)).await?;
    Ok((StatusCode::CREATED, Json(added)))
}

/// Trusts a certificate authority no more, and ends the connections that its certificates let in.
#[utoipa::path(delete, path = "/v1/admin/authorities/{id}", tag = "admin", params(("id" = i64, Path)), responses((status = 204)))]
async fn remove_authority(State(state): State<Rooms>, Admin(by): Admin, Named(id): Named<i64>) -> Answer<StatusCode> {
    let known = state.store.authorities().await?.into_iter().find(|known| known.id == id);
    let whom = known.map(|known| format!("{} for {}", known.fingerprint, known.user.as_deref().unwrap_or("everybody")));
    state.store.audit(&by.user, "authority.remove", &id.to_string(), whom.as_deref()).await?;
    state.store.remove_authority(id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The certificates that were revoked.
#[utoipa::path(get, path = "/v1/admin/revocations", tag = "admin", responses((status = 200, body = Vec<Revocation>)))]
async fn list_revocations(State(state): State<Rooms>, _: Admin) -> Answer<Json<Vec<Revocation>>> {
    Ok(Json(state.store.revocations().await?))
}

/// Revokes certificates, and ends the connections that they let in.
#[utoipa::path(post, path = "/v1/admin/revocations", tag = "admin", request_body = NewRevocation, responses((status = 201, body = Revocation)))]
async fn add_revocation(
    State(state): State<Rooms>,
    Admin(by): Admin,
    Body(new): Body<NewRevocation>,
) -> Answer<(StatusCode, Json<Revocation>)> {
    let NewRevocation { revoked, authority } = new;
    let what = match &revoked {
        Revoked::Serial(0) => {
            let message = "0 is no serial number: certificates that are not numbered have it";
            return Err(Failure::new(ErrorCode::BadRequest, message).hint("revoke them by key id or by key"));
        }
        Revoked::Serial(serial) => format!("serial {serial}"),
        Revoked::KeyId(id) if id.is_empty() || id.len() > MAX_KEY_ID => {
            let message = format!("a key id has 1 to {MAX_KEY_ID} bytes");
            return Err(Failure::new(ErrorCode::BadRequest, message));
        }
        Revoked::KeyId(id) => format!("key id {id}"),
        Revoked::Key(fingerprint) => {
            check_fingerprint(fingerprint)?;
            format!("key {fingerprint}")
        }
    };
    authority.as_deref().map(check_fingerprint).transpose()?;
    let whose = format!("of {}", authority.as_deref().unwrap_or("all authorities"));
    state.store.audit(&by.user, "certificate.revoke", &what, Some(&whose)).await?;
    let made = state.store.revoke(&revoked, authority.as_deref()).await?;
    Ok((StatusCode::CREATED, Json(made)))
}

/// Withdraws a revocation: the certificates let in again as long as they are valid.
#[utoipa::path(delete, path = "/v1/admin/revocations/{id}", tag = "admin", params(("id" = i64, Path)), responses((status = 204)))]
async fn remove_revocation(State(state): State<Rooms>, Admin(by): Admin, Named(id): Named<i64>) -> Answer<StatusCode> {
    state.store.audit(&by.user, "certificate.restore", &id.to_string(), None).await?;
    state.store.withdraw_revocation(id).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn check_fingerprint(text: &str) -> Answer<()> {
    let right = text.starts_with("SHA256:") && text.len() <= MAX_FINGERPRINT && !text.contains(char::is_whitespace);
    if right {
        return Ok(());
    }
    Err(Failure::new(ErrorCode::BadRequest, "a fingerprint is SHA256:…, as `ssh-keygen -l -f FILE` prints it"))
}
