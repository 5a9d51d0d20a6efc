//! HTTP over one connection: the routes, and what holds for all of them.

use super::{
    ApiState, Rooms, account, admin, artifacts, authorities, failure::Failure, forwarding, history, jobs, nodes,
    openapi, projects, reservations, view, workspaces,
};
use axum::{
    Router,
    body::Body,
    extract::DefaultBodyLimit,
    http::{Request, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use mlad::api::{ErrorCode, Identity};
use std::{any::Any, convert::Infallible, sync::LazyLock, time::Duration};
use tokio::io::{AsyncRead, AsyncWrite};
use tower::ServiceExt as _;
use tower_http::catch_panic::CatchPanicLayer;
use utoipa_axum::router::OpenApiRouter;

/// Time a client has to send the head of a request, from the moment it may.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of a request's head.
const MAX_HEAD: usize = 64 * 1024;
/// Headers of a request.
const MAX_HEADERS: usize = 64;
/// Bytes of a request's body: a submission is the largest.
const MAX_BODY: usize = 1024 * 1024;

/// Serves the API on one connection, to its end, to a caller who is known by the connection itself.
pub async fn serve_stream<S>(state: &ApiState, stream: S, identity: Identity)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let router = state.router.clone();
    serve(stream, move |mut request: Request<Body>| {
        request.extensions_mut().insert(identity.clone());
        router.clone().oneshot(request)
    })
    .await;
}

/// HTTP/1.1 on one connection: one request after the other.
pub(super) async fn serve<S, F>(stream: S, answer: impl Fn(Request<Body>) -> F)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    F: Future<Output = Result<Response, Infallible>>,
{
    let service = hyper::service::service_fn(|request: Request<Incoming>| answer(request.map(Body::new)));
    let result = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = result {
        tracing::debug!(%error, "an API connection ended badly");
    }
}

/// Every route that is described.
pub(super) fn described() -> OpenApiRouter<Rooms> {
    OpenApiRouter::new()
        .merge(view::routes())
        .merge(history::routes())
        .merge(jobs::routes())
        .merge(artifacts::routes())
        .merge(workspaces::routes())
        .merge(account::routes())
        .merge(projects::routes())
        .merge(reservations::routes())
        .merge(admin::routes())
        .merge(authorities::routes())
        .merge(forwarding::routes())
        .merge(nodes::routes())
}

pub(super) fn router(rooms: Rooms) -> Router {
    let (routes, _) = described().split_for_parts();
    routes
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/v1/openapi.json", get(document))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(CatchPanicLayer::custom(panicked))
        .with_state(rooms)
}

async fn document() -> Response {
    static DOCUMENT: LazyLock<String> = LazyLock::new(|| openapi().to_json().unwrap_or_default());
    ([(header::CONTENT_TYPE, "application/json")], DOCUMENT.as_str()).into_response()
}

async fn no_route(request: Request<Body>) -> Failure {
    Failure::not_found("path", request.uri().path()).hint("/v1/openapi.json describes the paths there are")
}

async fn no_method(request: Request<Body>) -> Response {
    let message = format!("{} is not a method of this path", request.method());
    let mut response = Failure::new(ErrorCode::BadRequest, message).into_response();
    *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
    response
}

/// One call that fails is not to end the others, nor to say more than that.
fn panicked(panic: Box<dyn Any + Send + 'static>) -> Response {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    tracing::error!(panic = text, "an API call panicked");
    Failure::new(ErrorCode::Internal, "the gateway failed; its log says why")
        .hint("tell an administrator")
        .into_response()
}
