//! Who calls, and what a handler may know of the request: extractors that refuse with [`Failure`].

use super::{Rooms, failure::Failure};
use crate::store::{StoreError, UserRecord};
use axum::{
    extract::{FromRequest, FromRequestParts, Path, Query, Request},
    http::request::Parts,
};
use mlad::api::{ErrorCode, Identity, Role};
use serde::de::DeserializeOwned;

/// Who the administration socket takes its caller for.
pub(super) const ROOT: &str = "root";

/// The caller as the connection says, checked against the database: a user who was disabled, or is no
/// administrator any more, is refused at the next call.
#[derive(Debug, Clone)]
pub(super) struct Caller(pub(super) Identity);

/// A caller with an account: everybody but `root` on the administration socket.
#[derive(Debug, Clone)]
pub(super) struct Account {
    pub(super) user: UserRecord,
    pub(super) identity: Identity,
}

/// A caller who may change what lets somebody in as them: their keys and tokens.
#[derive(Debug, Clone)]
pub(super) struct Holder(pub(super) Account);

/// A caller who may do everything.
#[derive(Debug, Clone)]
pub(super) struct Admin(pub(super) Identity);

impl Caller {
    pub(super) fn is_admin(&self) -> bool {
        self.0.role == Role::Admin
    }

    /// Whether the caller may see what belongs to this user.
    pub(super) fn may_see(&self, user: &str) -> bool {
        self.is_admin() || self.0.user == user
    }
}

impl FromRequestParts<Rooms> for Caller {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &Rooms) -> Result<Self, Failure> {
        let identity = identity(parts)?;
        if is_root(&identity) {
            return Ok(Self(identity));
        }
        Ok(Self(account(state, identity).await?.identity))
    }
}

impl FromRequestParts<Rooms> for Account {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &Rooms) -> Result<Self, Failure> {
        let identity = identity(parts)?;
        if is_root(&identity) {
            return Err(Failure::new(ErrorCode::Denied, "the administration socket is nobody's account")
                .hint("log in as a user: ssh mlad@server mlad …"));
        }
        account(state, identity).await
    }
}

impl FromRequestParts<Rooms> for Holder {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &Rooms) -> Result<Self, Failure> {
        let account = Account::from_request_parts(parts, state).await?;
        // A key or token has its owner's rights everywhere: by one of an administrator's, whatever runs in their
        // container would have them too.
        if account.identity.workload.is_some() && account.user.role == Role::Admin {
            let message = "an administrator's keys and tokens cannot be changed from a container";
            return Err(Failure::new(ErrorCode::Denied, message)
                .hint("use `ssh mlad@server mlad key …` or `ssh mlad@server mlad token …`"));
        }
        Ok(Self(account))
    }
}

impl FromRequestParts<Rooms> for Admin {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &Rooms) -> Result<Self, Failure> {
        let caller = Caller::from_request_parts(parts, state).await?;
        if caller.is_admin() {
            return Ok(Self(caller.0));
        }
        let refused = Failure::new(ErrorCode::Denied, "only an administrator may do this");
        Err(match caller.0.workload {
            Some(_) => refused.hint("containers never have an administrator's rights: use `ssh mlad@server mlad …`"),
            None => refused.hint("ask one, or use `mlad admin` as root on the server"),
        })
    }
}

fn identity(parts: &Parts) -> Result<Identity, Failure> {
    parts.extensions.get::<Identity>().cloned().ok_or_else(|| {
        Failure::new(ErrorCode::Unauthenticated, "this call needs a bearer token that is valid")
            .hint("`mlad token add LABEL`, in a container or by ssh, makes one; --token-file names the file it is in")
    })
}

fn is_root(identity: &Identity) -> bool {
    // No user can have that name, and no other connection is given it.
    identity.user == ROOT && identity.role == Role::Admin
}

/// The identity as the database has it now; it never gains a right by that.
async fn account(state: &Rooms, mut identity: Identity) -> Result<Account, Failure> {
    let user = match state.store.user_by_name(&identity.user).await {
        Ok(user) if user.enabled => user,
        Ok(_) | Err(StoreError::NotFound { .. }) => {
            return Err(Failure::new(ErrorCode::Denied, format!("the user {} may not log in", identity.user))
                .hint("ask an administrator"));
        }
        Err(error) => return Err(error.into()),
    };
    if user.role != Role::Admin {
        identity.role = Role::User;
    }
    Ok(Account { user, identity })
}

/// A JSON body.
pub(super) struct Body<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequest<Rooms> for Body<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &Rooms) -> Result<Self, Failure> {
        let axum::Json(body) = axum::Json::from_request(request, state).await?;
        Ok(Self(body))
    }
}

/// Parts of the path.
pub(super) struct Named<T>(pub(super) T);

impl<T: DeserializeOwned + Send> FromRequestParts<Rooms> for Named<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &Rooms) -> Result<Self, Failure> {
        let Path(names) = Path::from_request_parts(parts, state).await?;
        Ok(Self(names))
    }
}

/// What stands behind the question mark.
pub(super) struct Asked<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequestParts<Rooms> for Asked<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &Rooms) -> Result<Self, Failure> {
        let Query(query) = Query::from_request_parts(parts, state).await?;
        Ok(Self(query))
    }
}
