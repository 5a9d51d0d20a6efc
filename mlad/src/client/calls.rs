//! The calls of the API, one method each; paths and queries stand here and nowhere else.

use super::{Answer, Client, ClientError};
use crate::api::{
    ArtifactList, AuditList, CertificateAuthority, DefaultProject, Forwarding, GpuMap, Identity, Image, ImageList,
    Invite, Job, JobId, JobList, JobSpec, JobState, JobSubmitted, Lease, NewCertificateAuthority, NewImage, NewInvite,
    NewKey, NewProject, NewReservation, NewRevocation, NewToken, NewUser, NodeList, Past, Project, ProjectLimits,
    ProjectList, Quota, Reservation, ReservationList, Revocation, Role, SshKey, Token, UsageList, User, UserList, Wait,
    Workspace, WorkspaceList,
};
use hyper::Method;
use jiff::{Timestamp, civil::Date};
use serde_json::json;
use std::fmt::Write as _;

/// Seconds the gateway holds a call that waits for a job.
const LONG_POLL_SECONDS: u64 = 50;

/// Which use is asked for.
#[derive(Debug, Clone)]
pub struct UsageQuery {
    /// The first day, UTC.
    pub from: Date,
    /// The last day.
    pub to: Date,
    /// What it is told apart by.
    pub by: String,
    /// Of this user only.
    pub user: Option<String>,
    /// Of this project only.
    pub project: Option<String>,
}

/// Which jobs to list.
#[derive(Debug, Clone, Default)]
pub struct JobQuery {
    /// Those that have ended too.
    pub all: bool,
    /// Those in this state only.
    pub state: Option<JobState>,
    /// Those of this user (administrators); `*` for everybody's.
    pub user: Option<String>,
    /// At most so many; the gateway's own limit if absent.
    pub limit: Option<u32>,
    /// Those with a smaller number than this.
    pub before: Option<JobId>,
}

impl JobQuery {
    fn path(&self) -> String {
        let mut path = format!("/v1/jobs?all={}", self.all);
        if let Some(state) = self.state.and_then(|state| serde_json::to_value(state).ok()) {
            let _ = write!(path, "&state={}", state.as_str().unwrap_or_default());
        }
        if let Some(user) = &self.user {
            let _ = write!(path, "&user={}", escape(user));
        }
        if let Some(limit) = self.limit {
            let _ = write!(path, "&limit={limit}");
        }
        if let Some(before) = self.before {
            let _ = write!(path, "&before={before}");
        }
        path
    }
}

/// Who is calling, what there is, what is free.
impl Client {
    /// Who the gateway takes the caller for.
    ///
    /// # Errors
    /// As every call here: [`ClientError`].
    pub async fn whoami(&self) -> Result<Identity, ClientError> {
        self.get("/v1/whoami").await
    }

    /// Every GPU and what is on it.
    pub async fn gpus(&self) -> Result<GpuMap, ClientError> {
        self.get("/v1/gpus").await
    }

    /// Every lease in force.
    pub async fn leases(&self) -> Result<Vec<Lease>, ClientError> {
        self.get("/v1/leases").await
    }

    /// Every waiting request, first in line first.
    pub async fn waits(&self) -> Result<Vec<Wait>, ClientError> {
        self.get("/v1/waits").await
    }

    /// The catalog.
    pub async fn images(&self) -> Result<ImageList, ClientError> {
        self.get("/v1/images").await
    }

    /// What the caller may hold, and holds.
    pub async fn quota(&self) -> Result<Quota, ClientError> {
        self.get("/v1/quota").await
    }
}

/// Jobs.
impl Client {
    /// Hands in a job. When this returns it is accepted and survives any crash.
    pub async fn submit(&self, spec: &JobSpec) -> Result<JobSubmitted, ClientError> {
        self.post("/v1/jobs", spec).await
    }

    /// A page of jobs, newest first.
    pub async fn jobs(&self, query: &JobQuery) -> Result<JobList, ClientError> {
        self.get(&query.path()).await
    }

    /// One job.
    pub async fn job(&self, id: JobId) -> Result<Job, ClientError> {
        self.get(&format!("/v1/jobs/{id}")).await
    }

    /// Asks a job to end.
    pub async fn cancel(&self, id: JobId) -> Result<Job, ClientError> {
        self.post(&format!("/v1/jobs/{id}/cancel"), &json!({})).await
    }

    /// Keeps a queued job from starting.
    pub async fn hold(&self, id: JobId) -> Result<Job, ClientError> {
        self.post(&format!("/v1/jobs/{id}/hold"), &json!({})).await
    }

    /// Lets a held job start.
    pub async fn release(&self, id: JobId) -> Result<Job, ClientError> {
        self.post(&format!("/v1/jobs/{id}/release"), &json!({})).await
    }

    /// The job once it has ended or changed, or after a while as it is; call again until it has ended.
    /// `seen` is the state the caller knows.
    pub async fn poll_job(&self, id: JobId, seen: Option<JobState>) -> Result<Job, ClientError> {
        let mut path = format!("/v1/jobs/{id}/wait?timeout_seconds={LONG_POLL_SECONDS}");
        if let Some(state) = seen.and_then(|state| serde_json::to_value(state).ok()) {
            let _ = write!(path, "&seen={}", state.as_str().unwrap_or_default());
        }
        self.get(&path).await
    }

    /// The job once it has ended, however long that takes.
    pub async fn wait_for(&self, id: JobId) -> Result<Job, ClientError> {
        loop {
            let job = self.poll_job(id, None).await?;
            if job.state.has_ended() {
                return Ok(job);
            }
        }
    }

    /// A job's output from byte `offset`; with `follow` until the job has ended.
    pub async fn log(&self, id: JobId, offset: u64, follow: bool) -> Result<Answer, ClientError> {
        self.stream(&format!("/v1/jobs/{id}/log?offset={offset}&follow={follow}")).await
    }

    /// The files a job left.
    pub async fn artifacts(&self, id: JobId) -> Result<ArtifactList, ClientError> {
        self.get(&format!("/v1/jobs/{id}/artifacts")).await
    }

    /// The content of one of them; see [`Answer::digest`] for whether it is whole.
    pub async fn artifact(&self, id: JobId, path: &str) -> Result<Answer, ClientError> {
        let path = path.split('/').map(escape).collect::<Vec<_>>().join("/");
        self.stream(&format!("/v1/jobs/{id}/artifacts/{path}")).await
    }
}

/// Projects of the caller.
impl Client {
    /// The projects the caller is a member of.
    pub async fn projects(&self) -> Result<ProjectList, ClientError> {
        self.get("/v1/projects").await
    }

    /// Says what the caller's requests count for that name no project.
    pub async fn set_default_project(&self, project: Option<String>) -> Result<DefaultProject, ClientError> {
        self.send(Method::PUT, "/v1/projects/default", &DefaultProject { project }).await
    }
}

/// Workspaces, keys and tokens of the caller.
impl Client {
    /// The caller's workspaces; everybody's for an administrator with `all`.
    pub async fn workspaces(&self, all: bool) -> Result<WorkspaceList, ClientError> {
        self.get(&format!("/v1/workspaces?all={all}")).await
    }

    /// One workspace of the caller.
    pub async fn workspace(&self, name: &str) -> Result<Workspace, ClientError> {
        self.get(&format!("/v1/workspaces/{}", escape(name))).await
    }

    /// Ends a workspace's container and gives its slice back.
    pub async fn stop_workspace(&self, name: &str) -> Result<Workspace, ClientError> {
        self.post(&format!("/v1/workspaces/{}/stop", escape(name)), &json!({})).await
    }

    /// Moves a workspace's idle deadline.
    pub async fn extend_workspace(&self, name: &str, minutes: u64) -> Result<Workspace, ClientError> {
        self.post(&format!("/v1/workspaces/{}/extend", escape(name)), &json!({ "minutes": minutes })).await
    }

    /// The caller's keys.
    pub async fn keys(&self) -> Result<Vec<SshKey>, ClientError> {
        self.get("/v1/keys").await
    }

    /// Adds a key of the caller.
    pub async fn add_key(&self, key: &NewKey) -> Result<SshKey, ClientError> {
        self.post("/v1/keys", key).await
    }

    /// Removes a key of the caller; the last one that lets them in only with `force`.
    pub async fn remove_key(&self, fingerprint: &str, force: bool) -> Result<(), ClientError> {
        self.delete(&format!("/v1/keys/{}?force={force}", escape(fingerprint))).await
    }

    /// The caller's tokens.
    pub async fn tokens(&self) -> Result<Vec<Token>, ClientError> {
        self.get("/v1/tokens").await
    }

    /// Makes a token; its secret is in this answer alone.
    pub async fn add_token(&self, token: &NewToken) -> Result<Token, ClientError> {
        self.post("/v1/tokens", token).await
    }

    /// Revokes a token.
    pub async fn remove_token(&self, id: i64) -> Result<(), ClientError> {
        self.delete(&format!("/v1/tokens/{id}")).await
    }
}

/// Administration.
impl Client {
    /// Every user.
    pub async fn users(&self) -> Result<UserList, ClientError> {
        self.get("/v1/admin/users").await
    }

    /// Adds a user.
    pub async fn add_user(&self, user: &NewUser) -> Result<User, ClientError> {
        self.post("/v1/admin/users", user).await
    }

    /// Lets a user log in, or no longer.
    pub async fn enable_user(&self, name: &str, enabled: bool) -> Result<User, ClientError> {
        self.send(Method::PATCH, &user_path(name, ""), &json!({ "enabled": enabled })).await
    }

    /// Changes what a user may do.
    pub async fn set_role(&self, name: &str, role: Role) -> Result<User, ClientError> {
        self.send(Method::PATCH, &user_path(name, ""), &json!({ "role": role })).await
    }

    /// Changes what a user may hold at once; what is absent is without limit.
    pub async fn set_quota(&self, name: &str, quota: &Quota) -> Result<User, ClientError> {
        self.send(Method::PUT, &user_path(name, "/quota"), quota).await
    }

    /// Removes a user.
    pub async fn remove_user(&self, name: &str) -> Result<(), ClientError> {
        self.delete(&user_path(name, "")).await
    }

    /// The keys of a user.
    pub async fn keys_of(&self, name: &str) -> Result<Vec<SshKey>, ClientError> {
        self.get(&user_path(name, "/keys")).await
    }

    /// Adds a key of a user.
    pub async fn add_key_of(&self, name: &str, key: &NewKey) -> Result<SshKey, ClientError> {
        self.post(&user_path(name, "/keys"), key).await
    }

    /// Removes a key of a user.
    pub async fn remove_key_of(&self, name: &str, fingerprint: &str) -> Result<(), ClientError> {
        self.delete(&user_path(name, &format!("/keys/{}", escape(fingerprint)))).await
    }

    /// The certificate authorities that are trusted.
    pub async fn authorities(&self) -> Result<Vec<CertificateAuthority>, ClientError> {
        self.get("/v1/admin/authorities").await
    }

    /// Trusts a certificate authority.
    pub async fn add_authority(&self, new: &NewCertificateAuthority) -> Result<CertificateAuthority, ClientError> {
        self.post("/v1/admin/authorities", new).await
    }

    /// Trusts a certificate authority no more.
    pub async fn remove_authority(&self, id: i64) -> Result<(), ClientError> {
        self.delete(&format!("/v1/admin/authorities/{id}")).await
    }

    /// The certificates that were revoked.
    pub async fn revocations(&self) -> Result<Vec<Revocation>, ClientError> {
        self.get("/v1/admin/revocations").await
    }

    /// Revokes certificates.
    pub async fn revoke(&self, new: &NewRevocation) -> Result<Revocation, ClientError> {
        self.post("/v1/admin/revocations", new).await
    }

    /// Withdraws a revocation.
    pub async fn withdraw_revocation(&self, id: i64) -> Result<(), ClientError> {
        self.delete(&format!("/v1/admin/revocations/{id}")).await
    }

    /// What a user may forward by themselves.
    pub async fn user_forwarding(&self, name: &str) -> Result<Forwarding, ClientError> {
        self.get(&user_path(name, "/forwarding")).await
    }

    /// Changes what a user may forward.
    pub async fn set_user_forwarding(&self, name: &str, forwarding: Forwarding) -> Result<Forwarding, ClientError> {
        self.send(Method::PUT, &user_path(name, "/forwarding"), &forwarding).await
    }

    /// What the members of a project may forward.
    pub async fn project_forwarding(&self, name: &str) -> Result<Forwarding, ClientError> {
        self.get(&project_path(name, "/forwarding")).await
    }

    /// Changes what the members of a project may forward.
    pub async fn set_project_forwarding(&self, name: &str, forwarding: Forwarding) -> Result<Forwarding, ClientError> {
        self.send(Method::PUT, &project_path(name, "/forwarding"), &forwarding).await
    }

    /// Makes a one-time code, and its user if there is none of that name.
    pub async fn invite(&self, invite: &NewInvite) -> Result<Invite, ClientError> {
        self.post("/v1/admin/invites", invite).await
    }

    /// The tokens of a user.
    pub async fn tokens_of(&self, name: &str) -> Result<Vec<Token>, ClientError> {
        self.get(&user_path(name, "/tokens")).await
    }

    /// Makes a token for a user.
    pub async fn add_token_of(&self, name: &str, token: &NewToken) -> Result<Token, ClientError> {
        self.post(&user_path(name, "/tokens"), token).await
    }

    /// Revokes a token of a user.
    pub async fn remove_token_of(&self, name: &str, id: i64) -> Result<(), ClientError> {
        self.delete(&user_path(name, &format!("/tokens/{id}"))).await
    }

    /// Who held slices at a time.
    pub async fn past(&self, at: Timestamp) -> Result<Past, ClientError> {
        self.get(&format!("/v1/history?at={at}")).await
    }

    /// What was used from one day to another, told apart by `by` (`day`, `user`, `project`, or several with commas).
    pub async fn usage(&self, query: &UsageQuery) -> Result<UsageList, ClientError> {
        let mut path = format!("/v1/usage?from={}&to={}&by={}", query.from, query.to, escape(&query.by));
        for (key, value) in [("user", &query.user), ("project", &query.project)] {
            if let Some(value) = value {
                write!(path, "&{key}={}", escape(value)).ok();
            }
        }
        self.get(&path).await
    }

    /// Every machine with GPUs.
    pub async fn nodes(&self) -> Result<NodeList, ClientError> {
        self.get("/v1/admin/nodes").await
    }

    /// Forgets a machine that is lost and that nothing is held of any more.
    pub async fn forget_node(&self, name: &str) -> Result<(), ClientError> {
        self.delete(&format!("/v1/admin/nodes/{}", escape(name))).await
    }

    /// Takes a GPU out of quarantine.
    pub async fn trust_gpu(&self, uuid: &str) -> Result<(), ClientError> {
        self.act(&format!("/v1/admin/gpus/{}/trust", escape(uuid))).await
    }

    /// Every project.
    pub async fn all_projects(&self) -> Result<ProjectList, ClientError> {
        self.get("/v1/admin/projects").await
    }

    /// One project.
    pub async fn project(&self, name: &str) -> Result<Project, ClientError> {
        self.get(&project_path(name, "")).await
    }

    /// Makes a project.
    pub async fn add_project(&self, project: &NewProject) -> Result<Project, ClientError> {
        self.post("/v1/admin/projects", project).await
    }

    /// Removes a project.
    pub async fn remove_project(&self, name: &str) -> Result<(), ClientError> {
        self.delete(&project_path(name, "")).await
    }

    /// Changes what the members of a project may hold together; what is absent is without limit.
    pub async fn set_project_limits(&self, name: &str, limits: &ProjectLimits) -> Result<Project, ClientError> {
        self.send(Method::PUT, &project_path(name, "/limits"), limits).await
    }

    /// Makes somebody a member of a project.
    pub async fn add_member(&self, project: &str, user: &str) -> Result<Project, ClientError> {
        let path = project_path(project, &format!("/members/{}", escape(user)));
        self.send(Method::PUT, &path, &json!({})).await
    }

    /// Ends a membership.
    pub async fn remove_member(&self, project: &str, user: &str) -> Result<(), ClientError> {
        self.delete(&project_path(project, &format!("/members/{}", escape(user)))).await
    }

    /// The reservations that the caller may use.
    pub async fn reservations(&self) -> Result<ReservationList, ClientError> {
        self.get("/v1/reservations").await
    }

    /// Every reservation that is not over.
    pub async fn all_reservations(&self) -> Result<ReservationList, ClientError> {
        self.get("/v1/admin/reservations").await
    }

    /// Sets space aside.
    pub async fn reserve(&self, new: &NewReservation) -> Result<Reservation, ClientError> {
        self.post("/v1/admin/reservations", new).await
    }

    /// Sets it aside no longer.
    pub async fn remove_reservation(&self, name: &str) -> Result<(), ClientError> {
        self.delete(&format!("/v1/admin/reservations/{}", escape(name))).await
    }

    /// Adds an image to the catalog, or replaces the one of its name.
    pub async fn add_image(&self, image: &NewImage) -> Result<Image, ClientError> {
        self.post("/v1/admin/images", image).await
    }

    /// Takes an image out of the catalog: one that was added is forgotten, one of `catalog.toml` hidden.
    pub async fn remove_image(&self, name: &str) -> Result<(), ClientError> {
        self.delete(&format!("/v1/admin/images/{}", escape(name))).await
    }

    /// Lets what `catalog.toml` says of an image hold again.
    pub async fn restore_image(&self, name: &str) -> Result<Image, ClientError> {
        self.post(&format!("/v1/admin/images/{}/restore", escape(name)), &json!({})).await
    }

    /// Reads `catalog.toml` again.
    pub async fn reload_images(&self) -> Result<(), ClientError> {
        self.act("/v1/admin/images/reload").await
    }

    /// Takes a lease away from its workload, which is ended first.
    pub async fn revoke_lease(&self, workload: &str) -> Result<(), ClientError> {
        self.delete(&format!("/v1/admin/leases/{}", escape(workload))).await
    }

    /// Ends a workload now.
    pub async fn stop_workload(&self, workload: &str) -> Result<(), ClientError> {
        self.act(&format!("/v1/admin/workloads/{}/stop", escape(workload))).await
    }

    /// The audit log, newest first.
    pub async fn audit(&self, limit: u32) -> Result<AuditList, ClientError> {
        self.get(&format!("/v1/admin/audit?limit={limit}")).await
    }
}

fn project_path(name: &str, rest: &str) -> String {
    format!("/v1/admin/projects/{}{rest}", escape(name))
}

fn user_path(name: &str, rest: &str) -> String {
    format!("/v1/admin/users/{}{rest}", escape(name))
}

/// Percent-encodes what is not unreserved (RFC 3986 section 2.3).
fn escape(text: &str) -> String {
    text.bytes().fold(String::new(), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_escaped_in_paths() {
        assert_eq!(escape("SHA256:a/b+c"), "SHA256%3Aa%2Fb%2Bc");
        assert_eq!(escape("데이터"), "%EB%8D%B0%EC%9D%B4%ED%84%B0");
        assert_eq!(user_path("a b", "/keys"), "/v1/admin/users/a%20b/keys");
    }

    #[test]
    fn a_job_query_says_only_what_is_asked() {
        let query = JobQuery { state: Some(JobState::Running), ..JobQuery::default() };
        assert_eq!(query.path(), "/v1/jobs?all=false&state=running");
    }
}
