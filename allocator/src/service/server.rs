//! The server.

use super::wire::{
    self, At, Days, HOLD, LONGEST_ACCOUNTS, LONGEST_CALL, Refusal, Renew, Resolve, Revoke, TAKE, Version,
};
use crate::{Account, AccountState, Allocate, AllocatorError, LeaseRequest};
use axum::{
    Json, Router,
    extract::{
        DefaultBodyLimit, FromRequest, FromRequestParts, Path, Query, Request, State,
        rejection::{JsonRejection, PathRejection, QueryRejection},
    },
    http::{StatusCode, header, request::Parts},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{delete, get, post},
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use mlad::api::{NewReservation, Reservation};
use serde::Serialize;
use std::{
    fs,
    io::{self, Read},
    net::SocketAddr,
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::{self, PathBuf},
    str::FromStr,
    sync::Arc,
    time::Duration,
};
use subtle::ConstantTimeEq;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::Semaphore,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

/// The most connections at once; a gateway has a handful.
const CONNECTIONS: usize = 1024;
/// How long a client may take over the head of a call.
const HEAD: Duration = Duration::from_secs(10);
/// How long calls under way may take when the server stops.
const DRAIN: Duration = Duration::from_secs(10);

/// Where the server listens: `127.0.0.1:7071`, `[::1]:7071`, or `unix:/run/mlad/allocator.sock`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// A TCP address.
    Tcp(SocketAddr),
    /// A Unix socket, which only its owner can open.
    Unix(PathBuf),
}

impl FromStr for Listen {
    type Err = AllocatorError;

    fn from_str(text: &str) -> Result<Self, AllocatorError> {
        if let Some(path) = text.strip_prefix("unix:") {
            return Ok(Self::Unix(path.into()));
        }
        let wrong = || {
            let what = "neither an address with a port (127.0.0.1:7071) nor unix:PATH";
            AllocatorError::Settings(format!("cannot listen on `{text}`: it is {what}"))
        };
        text.parse().map(Self::Tcp).map_err(|_| wrong())
    }
}

/// The secret that callers show.
pub struct Token(Vec<u8>);

impl Token {
    /// The shortest that is taken, in bytes.
    const SHORTEST: usize = 16;

    /// Reads the token from a file; white space around it does not count.
    ///
    /// # Errors
    /// [`AllocatorError::Settings`] when it cannot be read, when others than its owner can read or change it, or
    /// when it is too short to be a secret.
    pub fn read(path: &path::Path) -> Result<Self, AllocatorError> {
        let wrong = |why: String| AllocatorError::Settings(format!("the token file {}: {why}", path.display()));
        let failed = |error: io::Error| wrong(error.to_string());
        let file = fs::File::open(path).map_err(failed)?;
        let mode = file.metadata().map_err(failed)?.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            let why = "who can read it can take every slice";
            return Err(wrong(format!(
                "others than its owner have access to it (mode {mode:04o}), and {why}; chmod 600 it"
            )));
        }
        let mut text = String::new();
        // A token has one line; more than this is another kind of file.
        file.take(4096).read_to_string(&mut text).map_err(failed)?;
        let token = text.trim();
        if token.len() < Self::SHORTEST || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(wrong(format!("it has to hold at least {} visible ASCII characters", Self::SHORTEST)));
        }
        Ok(Self(token.as_bytes().to_vec()))
    }

    /// The value of the `Authorization` header that shows it.
    pub(super) fn bearer(&self) -> Vec<u8> {
        [b"Bearer ", self.0.as_slice()].concat()
    }

    fn is_shown_by(&self, request: &Request) -> bool {
        let shown = request.headers().get(header::AUTHORIZATION).map(|value| value.as_bytes());
        shown.is_some_and(|shown| shown.ct_eq(&self.bearer()).into())
    }
}

/// A bound socket.
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// Unix, with its path, removed at the end.
    Unix(UnixListener, PathBuf),
}

impl Listener {
    /// Binds. A Unix socket that a killed server left behind is replaced; one that is served is not.
    ///
    /// # Errors
    /// [`AllocatorError::Settings`] when it cannot be bound.
    pub async fn bind(listen: &Listen) -> Result<Self, AllocatorError> {
        let wrong = |error: io::Error| AllocatorError::Settings(format!("cannot listen on {listen:?}: {error}"));
        match listen {
            Listen::Tcp(address) => Ok(Self::Tcp(TcpListener::bind(address).await.map_err(wrong)?)),
            Listen::Unix(path) => Ok(Self::Unix(bind_unix(path).map_err(wrong)?, path.clone())),
        }
    }

    /// What a client connects to: `http://127.0.0.1:7071` or `unix:/run/mlad/allocator.sock`.
    pub fn url(&self) -> String {
        match self {
            Self::Tcp(listener) => {
                listener.local_addr().map_or_else(|_| "http://?".to_owned(), |at| format!("http://{at}"))
            }
            Self::Unix(_, path) => format!("unix:{}", path.display()),
        }
    }
}

fn bind_unix(path: &path::Path) -> io::Result<UnixListener> {
    if UnixStream::connect(path).is_ok() {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "another server answers there"));
    }
    // Nobody else may connect, not even in the moment before the mode is set: it gets its name last.
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&new)?;
    fs::set_permissions(&new, fs::Permissions::from_mode(0o600))?;
    fs::rename(&new, path)?;
    Ok(listener)
}

/// Serves `allocator` until `stop`, then lets calls under way end. With a `token`, only callers that show it
/// are heard.
pub async fn serve(allocator: Arc<dyn Allocate>, listener: Listener, token: Option<Token>, stop: CancellationToken) {
    let shared = Arc::new(Shared { allocator, token, stop: stop.clone() });
    let service = TowerToHyperService::new(router(shared));
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD);
    let graceful = GracefulShutdown::new();
    let permits = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = accept(&listener, &permits) => accepted,
        };
        let (stream, permit) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, most likely: it passes when connections end.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let connection = graceful.watch(http.serve_connection(TokioIo::new(stream), service.clone()));
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection broke");
            }
            drop(permit);
        });
    }
    if timeout(DRAIN, graceful.shutdown()).await.is_err() {
        tracing::warn!("some calls were cut off");
    }
    if let Listener::Unix(_, path) = &listener
        && let Err(error) = fs::remove_file(path)
    {
        tracing::debug!(%error, "the socket was gone already");
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

async fn accept(
    listener: &Listener,
    permits: &Arc<Semaphore>,
) -> io::Result<(Box<dyn Stream>, tokio::sync::OwnedSemaphorePermit)> {
    let permit = Arc::clone(permits).acquire_owned().await.map_err(io::Error::other)?;
    let stream: Box<dyn Stream> = match listener {
        Listener::Tcp(listener) => {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            Box::new(stream)
        }
        Listener::Unix(listener, _) => Box::new(listener.accept().await?.0),
    };
    Ok((stream, permit))
}

struct Shared {
    allocator: Arc<dyn Allocate>,
    token: Option<Token>,
    stop: CancellationToken,
}

fn router(shared: Arc<Shared>) -> Router {
    let calls = Router::new()
        .route("/v1/resolve", post(resolve))
        .route("/v1/requests", post(request))
        .route("/v1/requests/{workload}", get(state).delete(release))
        .route("/v1/requests/{workload}/renew", post(renew))
        .route("/v1/requests/{workload}/revoke", post(revoke))
        .route("/v1/leases", get(leases))
        .route("/v1/waits", get(waits))
        .route("/v1/map", get(map))
        .route("/v1/nodes", get(nodes))
        .route("/v1/nodes/{node}", delete(forget_node))
        .route("/v1/gpus/{gpu}/trust", post(trust_gpu))
        .route("/v1/past", get(past))
        .route("/v1/usage", get(usage))
        .route("/v1/accounts", get(accounts).post(set_accounts).layer(DefaultBodyLimit::max(LONGEST_ACCOUNTS)))
        .route("/v1/reservations", get(reservations).post(reserve))
        .route("/v1/reservations/{name}", delete(cancel_reservation))
        .layer(middleware::from_fn(bounded))
        .route("/v1/changed", get(changed))
        .method_not_allowed_fallback(|| async { refused(StatusCode::METHOD_NOT_ALLOWED, Refusal::NO_SUCH_CALL) })
        .fallback(|| async { refused(StatusCode::NOT_FOUND, Refusal::NO_SUCH_CALL) })
        .layer(middleware::from_fn_with_state(Arc::clone(&shared), authorised));
    // Without a token: says only that somebody is there.
    calls.route("/healthz", get(|| async { "ok" })).layer(DefaultBodyLimit::max(LONGEST_CALL)).with_state(shared)
}

async fn authorised(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    match &shared.token {
        Some(token) if !token.is_shown_by(&request) => {
            tracing::warn!(path = request.uri().path(), "a caller without the token was turned away");
            let refusal = refused(StatusCode::UNAUTHORIZED, Refusal::NO_TOKEN);
            ([(header::WWW_AUTHENTICATE, "Bearer")], refusal).into_response()
        }
        _ => next.run(request).await,
    }
}

async fn bounded(request: Request, next: Next) -> Response {
    match timeout(TAKE, next.run(request)).await {
        Ok(response) => response,
        Err(_) => refused(StatusCode::REQUEST_TIMEOUT, Refusal::LATE),
    }
}

/// An answer that is not the allocator's, but of the same form.
fn refused(status: StatusCode, refusal: Refusal<'_>) -> Response {
    (status, Json(refusal)).into_response()
}

type Answer<T> = Result<Json<T>, Failed>;

struct Failed(AllocatorError);

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(wire::status(&self.0)).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, Json(self.0)).into_response()
    }
}

fn told<T: Serialize>(result: Result<T, AllocatorError>) -> Answer<T> {
    result.map(Json).map_err(Failed)
}

/// A JSON body whose errors are told as ours are.
struct Body<T>(T);

impl<T: serde::de::DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Failed;

    async fn from_request(request: Request, state: &S) -> Result<Self, Failed> {
        let wrong = |rejection: JsonRejection| Failed(AllocatorError::Invalid(rejection.body_text()));
        Json::<T>::from_request(request, state).await.map(|Json(body)| Self(body)).map_err(wrong)
    }
}

/// What the path names, likewise.
struct Name(String);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = Failed;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failed> {
        let wrong = |rejection: PathRejection| Failed(AllocatorError::Invalid(rejection.body_text()));
        Path::from_request_parts(parts, state).await.map(|Path(name)| Self(name)).map_err(wrong)
    }
}

/// The query, likewise.
struct Asked<T>(T);

impl<T: serde::de::DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Asked<T> {
    type Rejection = Failed;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failed> {
        let wrong = |rejection: QueryRejection| Failed(AllocatorError::Invalid(rejection.body_text()));
        Query::from_request_parts(parts, state).await.map(|Query(asked)| Self(asked)).map_err(wrong)
    }
}

type Us = State<Arc<Shared>>;

async fn resolve(State(us): Us, Body(body): Body<Resolve>) -> Answer<crate::Resolved> {
    told(us.allocator.resolve(&body.need).await)
}

async fn request(State(us): Us, Body(request): Body<LeaseRequest>) -> Answer<crate::LeaseState> {
    told(us.allocator.request(&request).await)
}

async fn state(State(us): Us, Name(workload): Name) -> Answer<crate::LeaseState> {
    told(us.allocator.state(&workload).await)
}

async fn renew(State(us): Us, Name(workload): Name, Body(body): Body<Renew>) -> Answer<mlad::api::Lease> {
    told(us.allocator.renew(&workload, body.fence).await)
}

async fn release(State(us): Us, Name(workload): Name) -> Answer<()> {
    told(us.allocator.release(&workload).await)
}

async fn revoke(State(us): Us, Name(workload): Name, Body(body): Body<Revoke>) -> Answer<()> {
    told(us.allocator.revoke(&workload, &body.reason, body.free).await)
}

async fn leases(State(us): Us) -> Answer<Vec<mlad::api::Lease>> {
    told(us.allocator.leases().await)
}

async fn waits(State(us): Us) -> Answer<Vec<mlad::api::Wait>> {
    told(us.allocator.waits().await)
}

async fn map(State(us): Us) -> Answer<mlad::api::GpuMap> {
    told(us.allocator.map().await)
}

async fn nodes(State(us): Us) -> Answer<Vec<mlad::api::NodeInfo>> {
    told(us.allocator.nodes().await)
}

async fn forget_node(State(us): Us, Name(node): Name) -> Answer<()> {
    told(us.allocator.forget_node(&node).await)
}

async fn trust_gpu(State(us): Us, Name(gpu): Name) -> Answer<()> {
    told(us.allocator.trust_gpu(&gpu).await)
}

async fn accounts(State(us): Us) -> Answer<Vec<AccountState>> {
    told(us.allocator.accounts().await)
}

async fn set_accounts(State(us): Us, Body(body): Body<Vec<Account>>) -> Answer<()> {
    told(us.allocator.set_accounts(&body).await)
}

async fn reserve(State(us): Us, Body(new): Body<NewReservation>) -> Answer<Reservation> {
    told(us.allocator.reserve(&new).await)
}

async fn cancel_reservation(State(us): Us, Name(name): Name) -> Answer<()> {
    told(us.allocator.cancel_reservation(&name).await)
}

async fn reservations(State(us): Us) -> Answer<Vec<Reservation>> {
    told(us.allocator.reservations().await)
}

async fn past(State(us): Us, Asked(At { at }): Asked<At>) -> Answer<mlad::api::Past> {
    told(us.allocator.past(at).await)
}

async fn usage(State(us): Us, Asked(Days { from, to }): Asked<Days>) -> Answer<mlad::api::UsageList> {
    told(us.allocator.usage(from, to).await)
}

async fn changed(State(us): Us, Asked(Version { seen }): Asked<Version>) -> Answer<Version> {
    tokio::select! {
        // Ended rather than held: the client asks again, and finds who serves then.
        () = us.stop.cancelled() => told(Ok(Version { seen })),
        now = timeout(HOLD, us.allocator.changed(seen)) => match now {
            Ok(version) => told(version.map(|seen| Version { seen })),
            Err(_) => told(Ok(Version { seen })),
        },
    }
}
