//! The API over real sockets, called through the SDK, with the real controllers over a world of fakes.

use super::*;
use crate::{
    job::Jobs,
    store::UserRecord,
    testing::{self, CrashPoint, FakeAllocator, FakeRuntime, Observed, World},
    workspace::{Progress, Wish},
};
use jiff::{SignedDuration, Timestamp};
use mlad::{
    api::*,
    channel::Exit,
    client::{Client, ClientError, Endpoint, JobQuery},
};
use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
    time::Duration,
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UnixListener},
};
use tokio_util::sync::CancellationToken;

mod files;
mod projects;
mod reservations;

const PATIENCE: Duration = Duration::from_secs(30);
const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ8HVnfd/QgKBqTN8l9NFzeMTHIbEkGI3xGo6dmQyN7f somebody@laptop";

struct Site {
    folder: TempDir,
    world: World,
    state: ApiState,
    stop: CancellationToken,
}

impl Site {
    /// alice and bob, two slices.
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let world = World::new(2);
        let config = Arc::new(testing::config(folder.path()));
        let store = testing::store(folder.path()).await;
        for name in ["alice", "bob"] {
            store.add_user(&NewUser { name: name.into(), role: None, uid: None }).await.unwrap();
        }
        let allocator: Arc<dyn Allocate> = Arc::new(FakeAllocator::new(&world, &CrashPoint::never()));
        let runtime: Arc<dyn Runtime> = Arc::new(FakeRuntime::new(&world, &CrashPoint::never()));
        let catalog = Arc::new(Catalog::load(&config, store.clone()).unwrap());
        let parts = || (config.clone(), store.clone(), allocator.clone(), runtime.clone(), catalog.clone());
        let (a, b, c, d, e) = parts();
        let workspaces = Workspaces::start(a, b, c, d, e, Observed::new()).await.unwrap();
        let (a, b, c, d, e) = parts();
        let jobs = Jobs::start(a, b, c, d, e, Observed::new()).await.unwrap();
        let rooms = Rooms::new(config, store, allocator, runtime, catalog, workspaces, jobs);
        Self { folder, world, state: ApiState::new(rooms), stop: CancellationToken::new() }
    }

    /// A socket on which everybody is this caller.
    fn socket(&self, identity: Identity) -> PathBuf {
        let path = self.folder.path().join(format!("{}.sock", rand::random::<u64>()));
        let listener = UnixListener::bind(&path).unwrap();
        let state = self.state.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (state, identity) = (state.clone(), identity.clone());
                tokio::spawn(async move { serve_stream(&state, stream, identity).await });
            }
        });
        path
    }

    fn client(&self, identity: Identity) -> Client {
        Client::new(Endpoint::Unix(self.socket(identity)))
    }

    /// Logged in by `ssh mlad@server mlad …`.
    fn person(&self, name: &str) -> Client {
        self.client(Identity { user: name.into(), role: Role::Admin, workload: None })
    }

    fn root(&self) -> Client {
        let path = self.folder.path().join(format!("{}.sock", rand::random::<u64>()));
        let listener = bind_admin(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        tokio::spawn(serve_admin(self.state.clone(), listener, self.stop.clone()));
        Client::new(Endpoint::Unix(path))
    }

    async fn tcp(&self) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve_tcp(self.state.clone(), listener, self.stop.clone()));
        address
    }

    fn with_token(&self, address: SocketAddr, token: &str) -> Client {
        let path = self.folder.path().join(format!("{}.token", rand::random::<u64>()));
        fs::write(&path, token).unwrap();
        Client::new(Endpoint::Tcp(address)).with_token_file(&path).unwrap()
    }

    async fn user(&self, name: &str) -> UserRecord {
        self.state.rooms.store.user_by_name(name).await.unwrap()
    }

    /// Puts a file of the user's into their home.
    async fn put(&self, user: &str, path: &str, content: &[u8]) -> PathBuf {
        let user = self.user(user).await;
        let home = self.folder.path().join("home").join(&user.name);
        let file = home.join(path);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, content).unwrap();
        for ancestor in file.ancestors().take_while(|ancestor| ancestor.starts_with(&home)) {
            chown(ancestor, Some(user.uid), Some(user.uid)).unwrap();
        }
        file
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn spec(json: &str) -> JobSpec {
    serde_json::from_str(json).unwrap()
}

async fn until_state(client: &Client, id: JobId, state: JobState) -> Job {
    let look = async {
        let mut job = client.job(id).await.unwrap();
        while job.state != state {
            assert!(!job.state.has_ended(), "{job:?}");
            job = client.poll_job(id, Some(job.state)).await.unwrap();
        }
        job
    };
    tokio::time::timeout(PATIENCE, look).await.unwrap()
}

fn code<T: std::fmt::Debug>(result: Result<T, ClientError>) -> ErrorCode {
    match result {
        Err(ClientError::Api(error)) => {
            assert!(!error.message.is_empty());
            error.code
        }
        other => panic!("{other:?}"),
    }
}

async fn whole(mut answer: mlad::client::Answer) -> Vec<u8> {
    let mut bytes = Vec::new();
    while let Some(piece) = answer.next().await.unwrap() {
        bytes.extend_from_slice(&piece);
    }
    bytes
}

#[tokio::test]
async fn a_job_goes_from_submission_to_its_files_and_nobody_else_sees_it() {
    let site = Site::start().await;
    let (alice, bob) = (site.person("alice"), site.person("bob"));
    let id = alice.submit(&spec(r#"{"command": ["train"], "need": "1g.5gb"}"#)).await.unwrap().id;
    until_state(&alice, id, JobState::Running).await;
    site.put("alice", &format!(".mlad/jobs/{id}/log"), b"epoch 1\nepoch 2\n").await;
    site.put("alice", &format!(".mlad/jobs/{id}/artifacts/model/weights"), b"0123456789").await;

    let mut following = alice.log(id, 8, true).await.unwrap();
    assert_eq!(following.next().await.unwrap().unwrap(), "epoch 2\n");
    site.world.end("j-1-1", Exit::Status(4), false);
    assert_eq!(following.next().await.unwrap(), None, "it ends with the job");
    let job = alice.wait_for(id).await.unwrap();
    assert_eq!((job.state, job.own_exit_code()), (JobState::Failed, 4));
    assert_eq!(job.directory, "/home/alice/.mlad/jobs/1");
    assert_eq!(whole(alice.log(id, 0, false).await.unwrap()).await, b"epoch 1\nepoch 2\n");
    assert_eq!(whole(alice.log(id, 99, false).await.unwrap()).await, b"");
    let artifacts = alice.artifacts(id).await.unwrap().artifacts;
    assert_eq!((artifacts.len(), artifacts[0].path.as_str(), artifacts[0].size), (1, "model/weights", 10));
    assert_eq!(whole(alice.artifact(id, "model/weights").await.unwrap()).await, b"0123456789");

    assert_eq!(code(bob.job(id).await), ErrorCode::NotFound);
    assert_eq!(code(bob.cancel(id).await), ErrorCode::NotFound);
    assert_eq!(code(bob.poll_job(id, None).await), ErrorCode::NotFound);
    assert_eq!(code(bob.log(id, 0, false).await), ErrorCode::NotFound);
    assert_eq!(code(bob.artifacts(id).await), ErrorCode::NotFound);
    assert_eq!(code(bob.artifact(id, "model/weights").await), ErrorCode::NotFound);
    let all = JobQuery { all: true, ..JobQuery::default() };
    assert_eq!(bob.jobs(&all).await.unwrap().jobs, []);
    let alices = JobQuery { user: Some("alice".into()), ..all.clone() };
    assert_eq!(code(bob.jobs(&alices).await), ErrorCode::Denied);
    assert_eq!(site.root().jobs(&alices).await.unwrap().jobs.len(), 1);
    // One that has ended is only shown when asked for.
    assert_eq!(alice.jobs(&JobQuery::default()).await.unwrap().jobs, []);
    assert_eq!(alice.jobs(&all).await.unwrap().jobs.len(), 1);
}

#[tokio::test]
async fn lists_come_in_pages() {
    let site = Site::start().await;
    let alice = site.person("alice");
    for _ in 0..5 {
        alice.submit(&spec(r#"{"command": ["x"], "hold": true}"#)).await.unwrap();
    }
    let mut query = JobQuery { limit: Some(2), state: Some(JobState::Held), ..JobQuery::default() };
    let mut pages = Vec::new();
    loop {
        let page = alice.jobs(&query).await.unwrap();
        pages.push(page.jobs.iter().map(|job| job.id).collect::<Vec<_>>());
        match page.next_before {
            Some(before) => query.before = Some(before),
            None => break,
        }
    }
    assert_eq!(pages, [vec![5, 4], vec![3, 2], vec![1]]);
}

async fn raw(socket: &Path, request: &str) -> String {
    let mut stream = tokio::net::UnixStream::connect(socket).await.unwrap();
    // The server may answer, and close, before it has read a request that is too long.
    let _ = stream.write_all(request.as_bytes()).await;
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await.unwrap();
    String::from_utf8(answer).unwrap()
}

#[tokio::test]
async fn whatever_is_sent_is_answered_with_an_error_in_json() {
    let site = Site::start().await;
    let socket = site.socket(Identity { user: "alice".into(), role: Role::User, workload: None });
    let post = |path: &str, body: &str| {
        let length = body.len();
        format!(
            "POST {path} HTTP/1.1\r\nHost: mlad\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {length}\r\n\r\n{body}"
        )
    };
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: mlad\r\nConnection: close\r\n\r\n");
    let large = format!(r#"{{"command": ["{}"]}}"#, "x".repeat(2 * 1024 * 1024));
    for (request, status, code) in [
        (post("/v1/jobs", "{"), "400", "bad-request"),
        (post("/v1/jobs", r#"{"command": ["x"], "comand": 1}"#), "400", "bad-request"),
        (post("/v1/jobs", r#"{"command": ["x"], "image": "nothing"}"#), "404", "not-found"),
        (post("/v1/jobs", r#"{"command": ["x"], "need": "7g.80gb"}"#), "422", "impossible"),
        (post("/v1/jobs", &large), "400", "bad-request"),
        (get("/v1/jobs/one"), "400", "bad-request"),
        (get("/v1/jobs/7"), "404", "not-found"),
        (get("/v1/jobs/1/log?offset=18446744073709551616"), "400", "bad-request"),
        (get("/v1/jobs?limit=many"), "400", "bad-request"),
        (get("/v1/jobs?colour=red"), "400", "bad-request"),
        (get("/v1/jobs?state=asleep"), "400", "bad-request"),
        (get("/v1/nothing"), "404", "not-found"),
        (post("/v1/whoami", "{}"), "405", "bad-request"),
        (get("/v1/admin/users"), "403", "denied"),
        (post("/v1/admin/invites", r#"{"user": "alice"}"#), "403", "denied"),
    ] {
        let answer = raw(&socket, &request).await;
        let line: String = request.chars().take(80).collect();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{line}: {answer}");
        let body = answer.split_once("\r\n\r\n").unwrap().1;
        let error: ApiError = serde_json::from_str(body).unwrap_or_else(|_| panic!("{line}: {answer}"));
        assert_eq!(serde_json::to_value(error.code).unwrap(), code, "{line}");
    }
    assert!(raw(&socket, &get("/healthz")).await.ends_with("ok\n"));
    let document = raw(&socket, &get("/v1/openapi.json")).await;
    assert!(document.contains("\"openapi\":\"3.1.0\""));
}

#[tokio::test]
async fn of_others_only_who_holds_what_is_seen() {
    let site = Site::start().await;
    let (alice, bob) = (site.person("alice"), site.person("bob"));
    for _ in 0..3 {
        alice.submit(&spec(r#"{"command": ["train"], "need": "1g.5gb"}"#)).await.unwrap();
    }
    until_state(&alice, 2, JobState::Running).await;
    site.state.rooms.jobs.until(3, |job| job.place == Some(1)).await;
    assert_eq!(alice.job(3).await.unwrap().place, Some(1));
    let seen = bob.leases().await.unwrap();
    assert_eq!(seen.len(), 2);
    assert!(seen.iter().all(|lease| lease.user == "alice" && lease.workload == "job" && lease.fence == 0));
    let own = alice.leases().await.unwrap();
    assert!(own.iter().all(|lease| lease.workload.starts_with("j-") && lease.fence > 0));
    let waits = bob.waits().await.unwrap();
    assert_eq!((waits[0].user.as_str(), waits[0].workload.as_str(), waits[0].detail.as_str()), ("alice", "job", ""));
    let quota = alice.quota().await.unwrap();
    assert_eq!((quota.slices_used, quota.gpu_memory_mib_used, quota.jobs_used), (2, 2 * 4864, 3));
    assert_eq!(bob.quota().await.unwrap().slices_used, 0);
    assert_eq!(bob.whoami().await.unwrap().role, Role::User, "the database says what somebody may do");
}

#[tokio::test]
async fn a_container_has_its_users_rights_and_never_an_administrators() {
    let site = Site::start().await;
    let root = site.root();
    root.set_role("alice", Role::Admin).await.unwrap();
    let person = site.person("alice");
    assert_eq!(person.whoami().await.unwrap().role, Role::Admin);
    assert_eq!(person.users().await.unwrap().users.len(), 2);
    let inside =
        |user: &str| site.client(Identity { user: user.into(), role: Role::User, workload: Some("w-1-1".into()) });
    assert_eq!(inside("alice").whoami().await.unwrap().role, Role::User);
    assert_eq!(code(inside("alice").users().await), ErrorCode::Denied);

    root.enable_user("bob", false).await.unwrap();
    assert_eq!(code(site.person("bob").whoami().await), ErrorCode::Denied);
    root.enable_user("bob", true).await.unwrap();
    assert_eq!(site.person("bob").whoami().await.unwrap().user, "bob");
    // The socket is nobody's account, and a user cannot become it by name.
    assert_eq!(code(root.quota().await), ErrorCode::Denied);
    assert_eq!(code(root.submit(&spec(r#"{"command": ["x"]}"#)).await), ErrorCode::Denied);
    let impostor = site.client(Identity { user: "root".into(), role: Role::User, workload: None });
    assert_eq!(code(impostor.whoami().await), ErrorCode::Denied);
}

#[tokio::test]
async fn an_administrators_container_cannot_let_itself_in_as_the_administrator() {
    let site = Site::start().await;
    let inside =
        |user: &str| site.client(Identity { user: user.into(), role: Role::User, workload: Some("w-1-1".into()) });
    let key = NewKey { public_key: KEY.into(), label: None, expires_at: None };
    let token = NewToken { label: "x".into(), valid_seconds: None };
    // A user's container may: the rights are the same on both sides.
    let added = inside("bob").add_key(&key).await.unwrap();
    assert_eq!(code(inside("bob").remove_key(&added.fingerprint, false).await), ErrorCode::Conflict, "his last");
    inside("bob").remove_key(&added.fingerprint, true).await.unwrap();
    let made = inside("bob").add_token(&token).await.unwrap();
    inside("bob").remove_token(made.id).await.unwrap();

    site.root().set_role("alice", Role::Admin).await.unwrap();
    let person = site.person("alice");
    let added = person.add_key(&key).await.unwrap();
    let made = person.add_token(&token).await.unwrap();
    let alice = inside("alice");
    for denied in [
        alice.add_key(&key).await.map(drop),
        alice.remove_key(&added.fingerprint, true).await,
        alice.add_token(&token).await.map(drop),
        alice.remove_token(made.id).await,
    ] {
        let Err(ClientError::Api(error)) = &denied else { panic!("{denied:?}") };
        assert!(error.hint.as_ref().is_some_and(|hint| hint.contains("ssh mlad@server mlad key")), "{error:?}");
        assert_eq!(code(denied), ErrorCode::Denied);
    }
    // Seeing them lets nobody in.
    assert_eq!((alice.keys().await.unwrap().len(), alice.tokens().await.unwrap().len()), (1, 1));
    person.remove_key(&added.fingerprint, true).await.unwrap();
    person.remove_token(made.id).await.unwrap();
}

#[tokio::test]
async fn tokens_open_the_api_on_tcp_until_they_are_revoked() {
    let site = Site::start().await;
    let alice = site.person("alice");
    let address = site.tcp().await;
    let token = alice.add_token(&NewToken { label: "laptop".into(), valid_seconds: None }).await.unwrap();
    let secret = token.secret.unwrap();
    let client = site.with_token(address, &secret);
    let me = client.whoami().await.unwrap();
    assert_eq!((me.user.as_str(), me.role), ("alice", Role::User));
    let listed = alice.tokens().await.unwrap();
    assert_eq!((listed.len(), listed[0].label.as_str(), &listed[0].secret), (1, "laptop", &None));
    assert!(listed[0].last_used_at.is_some());

    assert_eq!(code(Client::new(Endpoint::Tcp(address)).whoami().await), ErrorCode::Unauthenticated);
    let mut other = secret.clone();
    other.pop();
    for wrong in [other, format!("{secret}a"), "mlad_1_".into(), "mlad_x_y".into(), "x".into()] {
        assert_eq!(code(site.with_token(address, &wrong).whoami().await), ErrorCode::Unauthenticated, "{wrong}");
    }
    assert_eq!(code(site.person("bob").remove_token(token.id).await), ErrorCode::NotFound);
    alice.remove_token(token.id).await.unwrap();
    assert_eq!(code(client.whoami().await), ErrorCode::Unauthenticated);

    let life = |seconds| NewToken { label: "x".into(), valid_seconds: Some(seconds) };
    assert_eq!(code(alice.add_token(&life(0)).await), ErrorCode::BadRequest);
    assert_eq!(code(alice.add_token(&life(u64::MAX)).await), ErrorCode::BadRequest);
    let user = site.user("alice").await;
    let over = site.state.rooms.store.add_token(user.id, "old", Timestamp::now() - SignedDuration::from_secs(1)).await;
    let client = site.with_token(address, &over.unwrap().secret.unwrap());
    assert_eq!(code(client.whoami().await), ErrorCode::Unauthenticated, "it has expired");
    // A health check needs none.
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.ends_with("ok\n"));
}

#[tokio::test]
async fn what_an_administrator_does_is_done_and_written_down() {
    let site = Site::start().await;
    let root = site.root();
    let carol = root.add_user(&NewUser { name: "carol".into(), role: None, uid: None }).await.unwrap();
    assert!(site.folder.path().join("home/carol").is_dir());
    assert_eq!(
        code(root.add_user(&NewUser { name: "carol".into(), role: None, uid: None }).await),
        ErrorCode::Conflict
    );
    let quota = Quota { slices: Some(0), jobs: Some(3), ..Quota::default() };
    root.set_quota("carol", &quota).await.unwrap();
    let denied = site.person("carol").submit(&spec(r#"{"command": ["x"], "need": "1g.5gb"}"#)).await;
    assert_eq!(code(denied), ErrorCode::Quota);
    let invite = root.invite(&NewInvite { user: "dave".into(), valid_seconds: None }).await.unwrap();
    assert_eq!(site.user("dave").await.name, "dave");
    let added =
        root.add_key_of("carol", &NewKey { public_key: KEY.into(), label: None, expires_at: None }).await.unwrap();
    assert_eq!(root.keys_of("carol").await.unwrap(), std::slice::from_ref(&added));
    root.remove_key_of("carol", &added.fingerprint).await.unwrap();
    assert_eq!(code(root.remove_key_of("carol", &added.fingerprint).await), ErrorCode::NotFound);
    let bad = NewKey { public_key: "ssh-ed25519 AAAA".into(), label: None, expires_at: None };
    assert_eq!(code(site.person("alice").add_key(&bad).await), ErrorCode::BadRequest);
    let over = NewKey { public_key: KEY.into(), label: None, expires_at: Some(Timestamp::now()) };
    assert_eq!(code(site.person("alice").add_key(&over).await), ErrorCode::BadRequest);
    let image = NewImage {
        name: "mine".into(),
        reference: "mlad/base:1".into(),
        description: "one of ours".into(),
        min_gpu_memory_mib: 0,
    };
    assert!(root.add_image(&image).await.unwrap().available);
    assert!(site.person("alice").images().await.unwrap().images.iter().any(|image| image.name == "mine"));
    root.remove_image("mine").await.unwrap();
    root.remove_image("base").await.unwrap();
    assert!(site.person("alice").images().await.unwrap().images.iter().all(|image| image.name != "base"));
    assert_eq!(root.restore_image("base").await.unwrap().reference, "mlad/base:1");
    for nothing_to_restore in ["base", "mine"] {
        assert_eq!(code(root.restore_image(nothing_to_restore).await), ErrorCode::NotFound);
    }
    root.reload_images().await.unwrap();
    root.remove_user("carol").await.unwrap();
    assert_eq!(code(root.remove_user("carol").await), ErrorCode::NotFound);

    let events = root.audit(100).await.unwrap().events;
    let done: Vec<(&str, &str)> =
        events.iter().rev().map(|event| (event.action.as_str(), event.target.as_str())).collect();
    for wanted in [
        ("user.add", "carol"),
        ("user.quota", "carol"),
        ("invite.add", "dave"),
        ("user.add", "dave"),
        ("key.add", "carol"),
        ("key.remove", "carol"),
        ("image.add", "mine"),
        ("image.remove", "mine"),
        ("image.restore", "base"),
        ("image.reload", "catalog"),
        ("user.remove", "carol"),
    ] {
        assert!(done.contains(&wanted), "{wanted:?} in {done:?}");
    }
    assert!(events.iter().all(|event| event.actor == "root"));
    let text = format!("{events:?}");
    assert!(!text.contains(&invite.code) && !text.contains(&carol.uid.to_string()));
    assert_eq!(code(site.person("alice").audit(1).await), ErrorCode::Denied);
}

#[tokio::test]
async fn workloads_are_stopped_and_leases_taken_back_whoever_holds_them() {
    let site = Site::start().await;
    let (root, alice) = (site.root(), site.person("alice"));
    let first = alice.submit(&spec(r#"{"command": ["x"], "need": "1g.5gb"}"#)).await.unwrap().id;
    let second = alice.submit(&spec(r#"{"command": ["x"], "need": "1g.5gb"}"#)).await.unwrap().id;
    until_state(&alice, first, JobState::Running).await;
    until_state(&alice, second, JobState::Running).await;
    // One that waits for a slice is nobody's lease, but a workload.
    let third = alice.submit(&spec(r#"{"command": ["x"], "need": "1g.5gb"}"#)).await.unwrap().id;
    site.state.rooms.jobs.until(third, |job| job.place == Some(1)).await;
    assert_eq!(code(root.revoke_lease("j-3-1").await), ErrorCode::NotFound);
    root.stop_workload("j-3-1").await.unwrap();
    until_state(&alice, third, JobState::Cancelled).await;
    assert_eq!(code(root.stop_workload("j-3-1").await), ErrorCode::NotFound);

    root.stop_workload("j-1-1").await.unwrap();
    until_state(&alice, first, JobState::Cancelled).await;
    root.revoke_lease("j-2-1").await.unwrap();
    until_state(&alice, second, JobState::Held).await;
    assert!(site.world.leases().is_empty() && site.world.running().is_empty());
    assert_eq!(code(root.stop_workload("j-1-1").await), ErrorCode::NotFound);
    assert_eq!(code(root.stop_workload("w-9-9").await), ErrorCode::NotFound);
    assert_eq!(code(alice.stop_workload("j-2-1").await), ErrorCode::Denied);
    // A cancel by somebody else is written down, one's own is not.
    root.cancel(second).await.unwrap();
    let events = root.audit(100).await.unwrap().events;
    assert_eq!(events[0].action, "job.cancel");
    assert_eq!(site.world.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn a_job_takes_image_and_slice_of_the_workspace_that_sends_it() {
    let site = Site::start().await;
    let user = site.user("alice").await;
    let wish = Wish {
        name: "default".into(),
        image: Some("base".into()),
        need: Some(Need::Profile("1g.5gb".into())),
        project: None,
    };
    let mut entering = site.state.rooms.workspaces.enter(&user, wish).await.unwrap();
    let attached = loop {
        if let Progress::Ready(attached) = entering.next().await.unwrap() {
            break attached;
        }
    };
    let workload = attached.workload().to_owned();
    let inside = site.client(Identity { user: "alice".into(), role: Role::User, workload: Some(workload.clone()) });
    let id = inside.submit(&spec(r#"{"command": ["train"]}"#)).await.unwrap().id;
    let job = until_state(&inside, id, JobState::Running).await;
    assert_eq!((job.spec.image.as_deref(), job.spec.need), (Some("base"), Some(Need::Profile("1g.5gb".into()))));
    // And a job sent by that job likewise.
    let from_job = Identity { user: "alice".into(), role: Role::User, workload: Some("j-1-1".into()) };
    let child = site.client(from_job).submit(&spec(r#"{"command": ["x"]}"#)).await.unwrap().id;
    assert_eq!(inside.job(child).await.unwrap().spec.need, Some(Need::Profile("1g.5gb".into())));
    // From elsewhere: what the settings say.
    let outside = site.person("alice").submit(&spec(r#"{"command": ["x"]}"#)).await.unwrap().id;
    assert_eq!(inside.job(outside).await.unwrap().spec.need, Some(Need::Cpu));

    let seen = inside.workspaces(false).await.unwrap().workspaces;
    assert_eq!((seen.len(), seen[0].state), (1, WorkspaceState::Running));
    assert_eq!(code(site.person("bob").workspace("default").await), ErrorCode::NotFound);
    assert_eq!(code(site.person("bob").workspaces(true).await), ErrorCode::Denied);
    inside.extend_workspace("default", 90).await.unwrap();
    site.root().stop_workload(&workload).await.unwrap();
    assert_eq!(inside.workspace("default").await.unwrap().state, WorkspaceState::Stopped);
}
