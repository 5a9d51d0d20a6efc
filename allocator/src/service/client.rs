//! The client.

use super::{
    Token,
    wire::{HOLD, LONGEST_ANSWER, Refusal, Renew, Resolve, Revoke, TAKE, Version},
};
use crate::{
    Account, AccountState, Allocate, AllocatorError, LeaseRequest, LeaseState, Resolved, is_workload_name,
    remote::is_node_name,
};
use async_trait::async_trait;
use axum::body::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Method, Request, StatusCode,
    client::conn::http1::{self, SendRequest},
    header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue},
};
use hyper_util::rt::TokioIo;
use jiff::{Timestamp, civil::Date};
use mlad::api::{GpuMap, Lease, Need, NewReservation, NodeInfo, Past, Reservation, UsageList, Wait};
use serde::{Serialize, de::DeserializeOwned};
use std::{
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    net::{TcpStream, UnixStream},
    task::JoinHandle,
    time::timeout,
};

/// Connections kept for the next call.
const IDLE: usize = 16;
/// How long a connection may take to come about.
const CONNECT: Duration = Duration::from_secs(5);
/// What a call may take beyond what the server allows itself.
const MARGIN: Duration = Duration::from_secs(5);

/// An allocator that is a service elsewhere.
pub struct HttpAllocator {
    url: String,
    endpoint: Endpoint,
    token: Option<HeaderValue>,
    /// The only node whose slices are asked for.
    node: Option<String>,
    idle: Mutex<Vec<Connection>>,
}

#[derive(Debug, Clone)]
enum Endpoint {
    Unix(PathBuf),
    Tcp(String),
}

/// A connection; its task ends with it.
struct Connection {
    sender: SendRequest<Full<Bytes>>,
    task: JoinHandle<()>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl HttpAllocator {
    /// The allocator at `url`: `unix:/run/mlad/allocator.sock` or `http://10.0.0.5:7071`. Nothing is connected
    /// yet: every call finds out anew, so that the service may come and go.
    ///
    /// # Errors
    /// [`AllocatorError::Settings`] when the URL is of another kind.
    pub fn new(url: &str, token: Option<&Token>) -> Result<Self, AllocatorError> {
        let wrong = |why: &str| AllocatorError::Settings(format!("the allocator's URL `{url}`: {why}"));
        let endpoint = match (url.strip_prefix("unix:"), url.strip_prefix("http://")) {
            (Some(path), _) if path.starts_with('/') => Endpoint::Unix(path.into()),
            (_, Some(host)) => {
                let host = host.trim_end_matches('/');
                let port = host.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
                if port.is_none() || host.contains('/') {
                    return Err(wrong("it has to be http://HOST:PORT, and no more"));
                }
                Endpoint::Tcp(host.to_owned())
            }
            _ => return Err(wrong("it has to be http://HOST:PORT or unix:/PATH")),
        };
        let token = token.map(|token| HeaderValue::from_bytes(&token.bearer()));
        let mut token = token.transpose().map_err(|error| AllocatorError::Settings(error.to_string()))?;
        if let Some(token) = &mut token {
            token.set_sensitive(true);
        }
        Ok(Self { url: url.to_owned(), endpoint, token, node: None, idle: Mutex::default() })
    }

    /// The same, asking for slices of this node only, where a request names none: for a gateway that runs its
    /// containers there.
    #[must_use]
    pub fn on_node(self, node: Option<String>) -> Self {
        Self { node, ..self }
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, AllocatorError> {
        self.call(Method::GET, path, Bytes::new(), TAKE).await
    }

    async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, AllocatorError> {
        let body = serde_json::to_vec(body).map_err(|error| AllocatorError::Invalid(error.to_string()))?;
        self.call(Method::POST, path, body.into(), TAKE).await
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        takes: Duration,
    ) -> Result<T, AllocatorError> {
        let late = |_| self.unreachable("it does not answer in time");
        let (status, body) = timeout(takes + MARGIN, self.exchange(&method, path, &body)).await.map_err(late)??;
        if status.is_success() {
            return serde_json::from_slice(&body)
                .map_err(|error| self.unreachable(&format!("its answer is none of ours: {error}")));
        }
        match serde_json::from_slice::<AllocatorError>(&body) {
            Ok(error) => Err(error),
            Err(_) if status == StatusCode::UNAUTHORIZED => Err(self.unreachable("it does not take our token")),
            Err(_) => Err(self.unreachable(&match serde_json::from_slice::<Refusal<'_>>(&body) {
                Ok(Refusal { detail, .. }) => format!("it answers {status}: {detail}"),
                Err(_) => format!("it answers {status}"),
            })),
        }
    }

    /// One call and its answer. Every call can be repeated, so one that a kept connection loses is.
    async fn exchange(&self, method: &Method, path: &str, body: &Bytes) -> Result<(StatusCode, Bytes), AllocatorError> {
        while let Some(kept) = self.kept() {
            if let Ok(answer) = self.send(kept, method, path, body).await {
                return Ok(answer);
            }
        }
        let fresh = timeout(CONNECT, self.connect())
            .await
            .map_err(|_| self.unreachable("it cannot be connected to in time"))??;
        self.send(fresh, method, path, body).await
    }

    async fn send(
        &self,
        mut connection: Connection,
        method: &Method,
        path: &str,
        body: &Bytes,
    ) -> Result<(StatusCode, Bytes), AllocatorError> {
        let broken = |error: hyper::Error| self.unreachable(&error.to_string());
        let host = match &self.endpoint {
            Endpoint::Tcp(host) => host.as_str(),
            Endpoint::Unix(_) => "mlad",
        };
        let mut request = Request::builder().method(method).uri(path).header(HOST, host);
        if !body.is_empty() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        if let Some(token) = &self.token {
            request = request.header(AUTHORIZATION, token);
        }
        let request =
            request.body(Full::new(body.clone())).map_err(|error| AllocatorError::Invalid(error.to_string()))?;
        connection.sender.ready().await.map_err(broken)?;
        let response = connection.sender.send_request(request).await.map_err(broken)?;
        let status = response.status();
        let body = Limited::new(response.into_body(), LONGEST_ANSWER).collect().await;
        let body = body.map_err(|error| self.unreachable(&error.to_string()))?.to_bytes();
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < IDLE && !connection.sender.is_closed() {
            idle.push(connection);
        }
        Ok((status, body))
    }

    fn kept(&self) -> Option<Connection> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(|connection| !connection.sender.is_closed());
        idle.pop()
    }

    async fn connect(&self) -> Result<Connection, AllocatorError> {
        let failed = |error: std::io::Error| self.unreachable(&error.to_string());
        match &self.endpoint {
            Endpoint::Unix(path) => self.handshake(UnixStream::connect(path).await.map_err(failed)?).await,
            Endpoint::Tcp(host) => {
                let stream = TcpStream::connect(host).await.map_err(failed)?;
                stream.set_nodelay(true).map_err(failed)?;
                self.handshake(stream).await
            }
        }
    }

    async fn handshake<S>(&self, stream: S) -> Result<Connection, AllocatorError>
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
    {
        let shaken = http1::handshake(TokioIo::new(stream)).await;
        let (sender, connection) = shaken.map_err(|error| self.unreachable(&error.to_string()))?;
        let task = tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "the connection to the allocator broke");
            }
        });
        Ok(Connection { sender, task })
    }

    fn unreachable(&self, reason: &str) -> AllocatorError {
        AllocatorError::Unreachable { url: self.url.clone(), reason: reason.to_owned() }
    }
}

/// The path of a workload's request, if that is a name at all.
fn path_of(workload: &str) -> Result<String, AllocatorError> {
    match is_workload_name(workload) {
        true => Ok(format!("/v1/requests/{workload}")),
        false => Err(AllocatorError::Unknown(workload.to_owned())),
    }
}

#[async_trait]
impl Allocate for HttpAllocator {
    async fn resolve(&self, need: &Need) -> Result<Resolved, AllocatorError> {
        self.post("/v1/resolve", &Resolve { need: need.clone() }).await
    }

    async fn request(&self, request: &LeaseRequest) -> Result<LeaseState, AllocatorError> {
        match &self.node {
            Some(node) if request.node.is_none() => {
                self.post("/v1/requests", &LeaseRequest { node: Some(node.clone()), ..request.clone() }).await
            }
            _ => self.post("/v1/requests", request).await,
        }
    }

    async fn state(&self, workload: &str) -> Result<LeaseState, AllocatorError> {
        self.get(&path_of(workload)?).await
    }

    async fn renew(&self, workload: &str, fence: u64) -> Result<Lease, AllocatorError> {
        self.post(&format!("{}/renew", path_of(workload)?), &Renew { fence }).await
    }

    async fn release(&self, workload: &str) -> Result<(), AllocatorError> {
        // What cannot be asked for cannot be held.
        let Ok(path) = path_of(workload) else { return Ok(()) };
        self.call(Method::DELETE, &path, Bytes::new(), TAKE).await
    }

    async fn revoke(&self, workload: &str, reason: &str, free: bool) -> Result<(), AllocatorError> {
        let Ok(path) = path_of(workload) else { return Ok(()) };
        self.post(&format!("{path}/revoke"), &Revoke { reason: reason.to_owned(), free }).await
    }

    async fn leases(&self) -> Result<Vec<Lease>, AllocatorError> {
        self.get("/v1/leases").await
    }

    async fn waits(&self) -> Result<Vec<Wait>, AllocatorError> {
        self.get("/v1/waits").await
    }

    async fn map(&self) -> Result<GpuMap, AllocatorError> {
        self.get("/v1/map").await
    }

    async fn set_accounts(&self, accounts: &[Account]) -> Result<(), AllocatorError> {
        self.post("/v1/accounts", &accounts).await
    }

    async fn accounts(&self) -> Result<Vec<AccountState>, AllocatorError> {
        self.get("/v1/accounts").await
    }

    async fn nodes(&self) -> Result<Vec<NodeInfo>, AllocatorError> {
        self.get("/v1/nodes").await
    }

    async fn forget_node(&self, node: &str) -> Result<(), AllocatorError> {
        // What cannot be a name cannot be known.
        if !is_node_name(node) {
            return Err(AllocatorError::Unknown(node.to_owned()));
        }
        self.call(Method::DELETE, &format!("/v1/nodes/{node}"), Bytes::new(), TAKE).await
    }

    async fn past(&self, at: Timestamp) -> Result<Past, AllocatorError> {
        self.get(&format!("/v1/past?at={at}")).await
    }

    async fn usage(&self, from: Date, to: Date) -> Result<UsageList, AllocatorError> {
        self.get(&format!("/v1/usage?from={from}&to={to}")).await
    }

    async fn trust_gpu(&self, gpu: &str) -> Result<(), AllocatorError> {
        let fine = gpu.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        if !fine || gpu.is_empty() {
            return Err(AllocatorError::Unknown(gpu.to_owned()));
        }
        self.call(Method::POST, &format!("/v1/gpus/{gpu}/trust"), Bytes::new(), TAKE).await
    }

    async fn reserve(&self, new: &NewReservation) -> Result<Reservation, AllocatorError> {
        self.post("/v1/reservations", new).await
    }

    async fn cancel_reservation(&self, name: &str) -> Result<(), AllocatorError> {
        // What is no name cannot be reserved.
        if !is_workload_name(name) {
            return Ok(());
        }
        self.call(Method::DELETE, &format!("/v1/reservations/{name}"), Bytes::new(), TAKE).await
    }

    async fn reservations(&self) -> Result<Vec<Reservation>, AllocatorError> {
        self.get("/v1/reservations").await
    }

    async fn changed(&self, seen: u64) -> Result<u64, AllocatorError> {
        loop {
            let path = format!("/v1/changed?seen={seen}");
            let now: Version = self.call(Method::GET, &path, Bytes::new(), HOLD).await?;
            if now.seen != seen {
                return Ok(now.seen);
            }
        }
    }
}
