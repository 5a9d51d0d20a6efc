//! The listeners of the API: TCP with bearer tokens, and the administration socket.

use super::{ApiState, caller::ROOT, server};
use axum::{
    body::Body,
    http::{HeaderMap, Request, header},
    response::Response,
};
use mlad::api::{Identity, Role};
use std::{convert::Infallible, io, os::unix::fs::PermissionsExt as _, path::Path, sync::Arc, time::Duration};
use tokio::{
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::Semaphore,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt as _;

/// Connections on TCP at once.
const TCP_CONNECTIONS: usize = 1024;
/// Connections on the administration socket at once.
const ADMIN_CONNECTIONS: usize = 64;
/// Pause after a connection could not be accepted: there may be no descriptors left.
const PAUSE: Duration = Duration::from_millis(100);
/// Time for calls under way to end at a shutdown.
const DRAIN: Duration = Duration::from_secs(5);

/// Serves the API on TCP until `shutdown`. Who calls is said by a bearer token; without one only what is
/// everybody's is answered.
pub async fn serve_tcp(state: ApiState, listener: TcpListener, shutdown: CancellationToken) {
    if let Ok(address) = listener.local_addr() {
        tracing::info!(%address, "the API listens on TCP");
        if !address.ip().is_loopback() {
            tracing::warn!(%address, "the API takes tokens without TLS: put a proxy with TLS before it");
        }
    }
    let accept = || async { listener.accept().await.map(|(stream, _)| stream) };
    let serve = |stream: TcpStream| {
        let state = state.clone();
        async move {
            let _ = stream.set_nodelay(true);
            server::serve(stream, |request| answer_token(state.clone(), request)).await;
        }
    };
    accept_loop(accept, TCP_CONNECTIONS, shutdown, serve).await;
}

async fn answer_token(state: ApiState, mut request: Request<Body>) -> Result<Response, Infallible> {
    let token = bearer(request.headers()).map(str::to_owned);
    if let Some(token) = token
        && let Some(identity) = identity_of(&state, &token).await
    {
        request.extensions_mut().insert(identity);
    }
    state.router.oneshot(request).await
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
}

/// Whose token this is; none if it is nobody's, or not good any more.
async fn identity_of(state: &ApiState, token: &str) -> Option<Identity> {
    let found = async {
        match state.rooms.store.user_of_token(token).await? {
            Some(id) => state.rooms.store.user_by_id(id).await.map(Some),
            None => Ok(None),
        }
    };
    match found.await {
        Ok(user) => user.map(|user| Identity { user: user.name, role: user.role, workload: None }),
        Err(error) => {
            tracing::error!(%error, "a token cannot be looked up");
            None
        }
    }
}

/// Makes the administration socket: for root alone. One that a killed gateway left is replaced.
///
/// # Errors
/// When it cannot be made.
pub fn bind_admin(path: &Path) -> io::Result<UnixListener> {
    // Bound under another name: at its own it never is there with rights for anybody else.
    let making = path.with_extension("making");
    for old in [path, making.as_path()] {
        match std::fs::remove_file(old) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    let listener = UnixListener::bind(&making)?;
    std::fs::set_permissions(&making, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&making, path)?;
    Ok(listener)
}

/// Serves the API on the administration socket until `shutdown`.
pub async fn serve_admin(state: ApiState, listener: UnixListener, shutdown: CancellationToken) {
    let accept = || async { listener.accept().await.map(|(stream, _)| stream) };
    let serve = |stream: UnixStream| {
        let state = state.clone();
        async move { serve_root(&state, stream).await }
    };
    accept_loop(accept, ADMIN_CONNECTIONS, shutdown, serve).await;
}

async fn serve_root(state: &ApiState, stream: UnixStream) {
    let peer = stream.peer_cred().map(|peer| peer.uid());
    if !matches!(peer, Ok(0)) {
        tracing::warn!(?peer, "refused a caller on the administration socket who is not root");
        return;
    }
    let identity = Identity { user: ROOT.into(), role: Role::Admin, workload: None };
    server::serve_stream(state, stream, identity).await;
}

async fn accept_loop<S, A, F>(accept: impl Fn() -> A, most: usize, shutdown: CancellationToken, serve: impl Fn(S) -> F)
where
    A: Future<Output = io::Result<S>>,
    F: Future<Output = ()> + Send + 'static,
{
    let room = Arc::new(Semaphore::new(most));
    let tasks = TaskTracker::new();
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { break };
        let accepted = tokio::select! {
            accepted = accept() => accepted,
            () = shutdown.cancelled() => break,
        };
        match accepted {
            Ok(stream) => {
                let serving = serve(stream);
                tasks.spawn(async move {
                    serving.await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "an API connection could not be accepted");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
    tasks.close();
    _ = tokio::time::timeout(DRAIN, tasks.wait()).await;
}
