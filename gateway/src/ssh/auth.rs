//! Who is calling: a key says it, or a certificate; a key nobody knows says it with a one-time code.
//!
//! # Enrolment
//! A client offers its keys one after the other, and a key nobody knows must not stand in the way of the next.
//! So a key that nobody knows signs (nobody can bind somebody else's public key), is noted, and is refused.
//! If the client comes to the end of its keys, keyboard-interactive is left, where the code is asked for; a
//! right one binds the first key that has signed, both in one transaction, and the login goes on with
//! whatever it came for. All of it is one connection: nothing is parked that another could complete.
//!
//! Signing may cost the person a passphrase or a touch. So unknown keys are asked to sign only while an
//! invitation is open, since otherwise no code can be right; else they are refused when they are offered.
//! (Partial success after the code, and a key after that, would need no such thing; but OpenSSH's client
//! gives public keys up for good once it has offered them all.)
//!
//! # Certificates
//! Of a certificate only the key it certifies is seen when it is offered, so while there is an authority every key
//! is asked to sign. Which user a certificate is its principals say: the one that is the login name, or, where that is
//! everybody's, the only one that is a user.
//!
//! A key that is known but not let in (another's login name, a disabled user, expired) is refused after it has signed,
//! too; the prompt then says why, since it is talking to the key's owner.

use super::{
    certificate::{CertificateError, Certified, examine, shown},
    connection::Server,
    grant::Grant,
    key::{KeyError, check_key, fingerprint, is_signature_taken, key_to_add},
    limits::UserConnection,
};
use crate::{
    config::Config,
    login::{LoginName, parse_login},
    store::{KeyToAdd, StoreError, UserRecord},
};
use jiff::Timestamp;
use mlad::api::Forwarding;
use russh::{
    MethodKind, MethodSet,
    keys::{Certificate, PublicKey},
    server::{Auth, PublicKeyOffer},
};
use std::{
    borrow::Cow,
    fmt,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

/// Keys one connection may offer.
pub(super) const MAX_OFFERS: usize = 32;
/// Longest code that is looked at, in bytes.
const MAX_CODE: usize = 128;

/// Somebody who is let in.
pub(super) struct Login {
    /// Who.
    pub(super) user: UserRecord,
    /// The workspace the login name means.
    pub(super) workspace: String,
    /// What let them in.
    pub(super) credential: Credential,
    /// What that allows.
    pub(super) grant: Grant,
    /// What they and their projects may forward.
    pub(super) policy: Forwarding,
    /// Counts among the user's connections.
    pub(super) slot: UserConnection,
}

/// What lets somebody in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Credential {
    /// A key of theirs, by its fingerprint.
    Key(String),
    /// A certificate of an authority that is trusted for them.
    Certificate(Box<Certified>),
}

impl fmt::Display for Credential {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key(fingerprint) => formatter.write_str(fingerprint),
            Self::Certificate(certified) => certified.fmt(formatter),
        }
    }
}

/// One connection on its way to a login.
pub(super) struct Authentication {
    server: Arc<Server>,
    config: Arc<Config>,
    peer: SocketAddr,
    /// Counts what did not let it in.
    refused: Arc<AtomicUsize>,
    offers: usize,
    /// The first key offered that nobody knows.
    unknown: Option<String>,
    /// The first of them that has signed.
    candidate: Option<Candidate>,
    wrong_codes: usize,
    /// What to tell at the next prompt.
    notice: Option<String>,
    login: Option<Login>,
}

/// A key that a code could bind.
struct Candidate {
    login_name: String,
    key: KeyToAdd,
}

/// Why somebody is not let in, in words for them.
struct Refusal(String);

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Conflict(reason) => Self(reason),
            error => {
                tracing::error!(%error, "nobody can log in: the database fails");
                Self("the server's database does not answer; try again in a moment".into())
            }
        }
    }
}

impl From<KeyError> for Refusal {
    fn from(error: KeyError) -> Self {
        Self(error.to_string())
    }
}

impl From<CertificateError> for Refusal {
    fn from(error: CertificateError) -> Self {
        Self(error.to_string())
    }
}

impl Authentication {
    pub(super) fn new(server: Arc<Server>, config: Arc<Config>, peer: SocketAddr, refused: Arc<AtomicUsize>) -> Self {
        Self {
            server,
            config,
            peer,
            refused,
            offers: 0,
            unknown: None,
            candidate: None,
            wrong_codes: 0,
            notice: None,
            login: None,
        }
    }

    /// The login, once it was let in.
    pub(super) fn take_login(&mut self) -> Option<Login> {
        self.login.take()
    }

    /// A key is offered, unproven: whether it is worth a signature.
    pub(super) async fn offered(&mut self, offer: PublicKeyOffer<'_>) -> Auth {
        self.offers += 1;
        if self.offers > MAX_OFFERS {
            return only(MethodKind::KeyboardInteractive);
        }
        match self.is_worth_a_signature(offer).await {
            Ok(true) => Auth::Accept,
            Ok(false) => self.reject(),
            Err(refusal) => self.refuse(refusal),
        }
    }

    /// A key has signed: whether it is let in.
    pub(super) async fn proven(&mut self, login_name: &str, key: &PublicKey) -> Auth {
        match self.admit_key(login_name, key).await {
            Ok(Some(login)) => {
                self.login = Some(login);
                Auth::Accept
            }
            Ok(None) => self.reject(),
            Err(refusal) => self.refuse(refusal),
        }
    }

    /// A key that was certified has signed: whether its certificate is let in.
    pub(super) async fn certified(&mut self, login_name: &str, certificate: &Certificate) -> Auth {
        match self.admit_certificate(login_name, certificate).await {
            Ok(login) => {
                self.login = Some(login);
                Auth::Accept
            }
            Err(refusal) => self.refuse(refusal),
        }
    }

    /// The prompt for a code (no `response` yet), or what was typed there; none if nothing was asked.
    pub(super) async fn prompted(&mut self, login_name: &str, response: Option<Option<String>>) -> Auth {
        if self.wrong_codes >= self.config.ssh.max_tries {
            return only(MethodKind::PublicKey);
        }
        match response {
            None => self.prompt(login_name),
            Some(None) => only(MethodKind::PublicKey),
            Some(Some(code)) => match self.admit_code(login_name, code.trim()).await {
                Ok(login) => {
                    self.login = Some(login);
                    Auth::Accept
                }
                Err(refusal) => {
                    self.wrong_codes += 1;
                    self.refuse(refusal)
                }
            },
        }
    }

    async fn is_worth_a_signature(&mut self, offer: PublicKeyOffer<'_>) -> Result<bool, Refusal> {
        if !is_signature_taken(offer.algorithm) {
            return Ok(false);
        }
        let name = fingerprint(offer.public_key);
        if self.server.store.user_by_key(&name).await?.is_some() {
            return Ok(true);
        }
        check_key(offer.public_key)?;
        self.unknown.get_or_insert(name);
        let store = &self.server.store;
        // Of a certificate only its key is seen here.
        Ok(store.has_authorities().await? || (self.candidate.is_none() && store.has_open_invites().await?))
    }

    /// None if nobody knows the key: it may become somebody's.
    async fn admit_key(&mut self, login_name: &str, key: &PublicKey) -> Result<Option<Login>, Refusal> {
        let name = fingerprint(key);
        match self.server.store.user_by_key(&name).await? {
            Some(known) if known.has_expired(Timestamp::now()) => Err(Refusal(expired(&name))),
            Some(known) => {
                self.admit(login_name, known.user, Credential::Key(name), Grant::everything()).await.map(Some)
            }
            None => {
                let key = key_to_add(key)?;
                if self.server.store.has_open_invites().await? {
                    self.candidate.get_or_insert(Candidate { login_name: login_name.into(), key });
                }
                Ok(None)
            }
        }
    }

    async fn admit_certificate(&self, login_name: &str, certificate: &Certificate) -> Result<Login, Refusal> {
        let certified = examine(certificate, self.peer.ip(), Timestamp::now())?;
        let store = &self.server.store;
        let authority = &certified.name.authority;
        if !store.is_authority(authority).await? {
            return Err(Refusal(format!(
                "your certificate is signed by {authority}, which is no authority here; ask an administrator"
            )));
        }
        if store.is_revoked(&certified.name).await? {
            return Err(Refusal(revoked(&certified)));
        }
        let user = self.user_of(login_name, &certified).await?;
        let grant = certified.grant.clone();
        self.admit(login_name, user, Credential::Certificate(Box::new(certified)), grant).await
    }

    /// The one user that a certificate is, of those its authority may let in: the login name says which, or there
    /// is only one.
    async fn user_of(&self, login_name: &str, certified: &Certified) -> Result<UserRecord, Refusal> {
        let (store, shared) = (&self.server.store, &self.config.ssh.shared_login);
        let login = parse_login(login_name, shared).map_err(|error| Refusal(error.to_string()))?;
        let mut users = Vec::new();
        for principal in &certified.principals {
            if login.user.as_ref().is_some_and(|wanted| wanted != principal) {
                continue;
            }
            match store.user_by_name(principal).await {
                Ok(user) if store.is_trusted(&certified.name.authority, user.id).await? => users.push(user),
                Ok(_) | Err(StoreError::NotFound { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if users.len() > 1 {
            let names: Vec<_> = users.iter().map(|user| user.name.as_str()).collect();
            let names = names.join(", ");
            return Err(Refusal(format!(
                "your certificate is for {names}: log in as the one you mean, not as {shared}"
            )));
        }
        users.pop().ok_or_else(|| {
            let named: Vec<_> = certified.principals.iter().map(|principal| shown(principal)).collect();
            let wanted = login.user.map(|user| format!(" and {user}")).unwrap_or_default();
            let named = named.join(", ");
            Refusal(format!("your certificate is for {named}: no user whom its authority may let in{wanted}"))
        })
    }

    async fn admit_code(&mut self, login_name: &str, code: &str) -> Result<Login, Refusal> {
        if !self.server.code_tries.allow(self.peer.ip()) {
            return Err(Refusal("too many codes from your address; try again in a minute".into()));
        }
        let Some(key) = self.candidate_for(login_name).cloned() else {
            return Err(Refusal("no key has proven itself; try again".into()));
        };
        let store = &self.server.store;
        let (peer, wrong) = (self.peer.to_string(), "this code is wrong, used or expired");
        let invited = if code.len() > MAX_CODE { None } else { store.invited_by(code).await? };
        let Some(user) = invited else {
            store.audit("", "key.enrol-refused", &key.fingerprint, Some(&peer)).await?;
            return Err(Refusal(wrong.into()));
        };
        // Before it is used up.
        self.check_user(&user, login_name)?;
        let user = store.redeem_invite(code, &key).await?.ok_or_else(|| Refusal(wrong.into()))?;
        store.audit(&user.name, "key.enrol", &key.fingerprint, Some(&peer)).await?;
        tracing::info!(user = user.name, fingerprint = key.fingerprint, peer, "enrolled a key");
        self.admit(login_name, user, Credential::Key(key.fingerprint), Grant::everything()).await
    }

    async fn admit(
        &self,
        login_name: &str,
        user: UserRecord,
        credential: Credential,
        grant: Grant,
    ) -> Result<Login, Refusal> {
        let LoginName { workspace, .. } = self.check_user(&user, login_name)?;
        let policy = self.server.store.forwarding_of(user.id).await?;
        let limit = self.config.ssh.max_connections_per_user;
        let slot = self.server.users.add(user.id, limit).ok_or_else(|| {
            Refusal(format!("you have {limit} connections open, which is the limit; close some of them first"))
        })?;
        let detail = credential.to_string();
        self.server.store.audit(&user.name, "login", &self.peer.to_string(), Some(&detail)).await?;
        Ok(Login { user, workspace, credential, grant, policy, slot })
    }

    /// Whether this user may log in under this name.
    fn check_user(&self, user: &UserRecord, login_name: &str) -> Result<LoginName, Refusal> {
        let shared = &self.config.ssh.shared_login;
        let login = parse_login(login_name, shared).map_err(|error| Refusal(error.to_string()))?;
        let name = &user.name;
        if login.user.as_ref().is_some_and(|wanted| wanted != name) {
            return Err(Refusal(format!("this is {name}'s: log in as {name} or {shared}")));
        }
        if !user.enabled {
            return Err(Refusal(format!("{name} may not log in any more; ask an administrator")));
        }
        Ok(login)
    }

    fn candidate_for(&self, login_name: &str) -> Option<&KeyToAdd> {
        self.candidate.as_ref().filter(|candidate| candidate.login_name == login_name).map(|candidate| &candidate.key)
    }

    fn refuse(&mut self, Refusal(reason): Refusal) -> Auth {
        tracing::info!(peer = %self.peer, reason, "refused a login");
        self.notice = Some(reason);
        self.reject()
    }

    fn reject(&self) -> Auth {
        self.refused.fetch_add(1, Ordering::Relaxed);
        Auth::reject()
    }

    fn prompt(&mut self, login_name: &str) -> Auth {
        let notice = self.notice.take().map(|notice| format!("mlad: {notice}"));
        let (text, prompts): (_, &'static [(Cow<'static, str>, bool)]) =
            match (self.candidate_for(login_name), &self.unknown) {
                (Some(key), _) => (
                    Some(format!(
                        "The key {} is not known here.\nWith an enrolment code from an administrator it becomes yours.",
                        key.fingerprint
                    )),
                    &[(Cow::Borrowed("Enrolment code: "), true)],
                ),
                (None, Some(unknown)) => (
                    Some(format!("The key {unknown} is not known here; ask an administrator for an enrolment code.")),
                    &[],
                ),
                (None, None) if notice.is_none() => (
                    Some(
                        "Your client has offered no key; make one with `ssh-keygen -t ed25519`, then try again.".into(),
                    ),
                    &[],
                ),
                (None, None) => (None, &[]),
            };
        let instructions = notice.into_iter().chain(text).collect::<Vec<_>>().join("\n").into();
        Auth::Partial { name: "".into(), instructions, prompts: Cow::Borrowed(prompts) }
    }
}

/// What is said of a certificate that was revoked.
pub(super) fn revoked(certified: &Certified) -> String {
    format!("the {certified} was revoked; ask for another")
}

/// What is said of a key that lets nobody in any more.
pub(super) fn expired(fingerprint: &str) -> String {
    format!("the key {fingerprint} has expired; log in with another, or ask an administrator")
}

/// Only this method can go on from here. (Never none: OpenSSH's client then asks for a password.)
fn only(method: MethodKind) -> Auth {
    Auth::Reject { proceed_with_methods: Some(MethodSet::from([method].as_slice())), partial_success: false }
}
