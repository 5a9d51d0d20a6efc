//! HTTP/1.1 over a Unix socket or TCP: one connection a call, everything bounded in size and time.

use super::{ClientError, Endpoint};
use crate::api::{ApiError, ErrorCode};
use bytes::{Bytes, BytesMut};
use data_encoding::BASE64;
use http_body_util::{BodyExt as _, Full};
use hyper::{
    Method, Request, Response,
    body::Incoming,
    client::conn::http1::{self, SendRequest},
    header::{ACCEPT, AUTHORIZATION, CONNECTION, CONTENT_TYPE, HOST, HeaderMap, HeaderValue, TE, TRAILER, USER_AGENT},
};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::json;
use std::{path::Path, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
    task::JoinHandle,
    time::timeout,
};

/// Longest time to connect.
const CONNECT_TIME: Duration = Duration::from_secs(10);
/// Longest time to the beginning of an answer; longer than the gateway holds a long poll (60 s).
const ANSWER_TIME: Duration = Duration::from_secs(90);
/// Longest JSON answer, in bytes.
const MAX_ANSWER: usize = 64 * 1024 * 1024;

/// A gateway to call. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Client {
    endpoint: Endpoint,
    token: Option<String>,
}

/// An answer whose body is read as it comes.
#[derive(Debug)]
pub struct Answer {
    body: Incoming,
    endpoint: String,
    digest: Digest,
    /// Drives the connection for as long as the body is read.
    connection: JoinHandle<()>,
}

/// The checksum of an answer's body, in its trailer `Content-Digest` (RFC 9530).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Digest {
    /// None was announced: this is no file, or a proxy stands between that passes no trailers on.
    NotPromised,
    /// It was announced and has not come. At the body's end: the gateway does not stand by what it sent.
    Missing,
    /// The SHA-256 of the body.
    Sum(Vec<u8>),
}

impl Client {
    /// A gateway at `endpoint`, without a token.
    pub fn new(endpoint: Endpoint) -> Self {
        Self { endpoint, token: None }
    }

    /// The gateway this environment points to (see [`Endpoint::from_environment`]), with the bearer token in
    /// the file that `MLAD_TOKEN_FILE` names, if it names one.
    ///
    /// # Errors
    /// When no gateway is named or found.
    pub fn from_environment() -> Result<Self, ClientError> {
        let mut client = Self::new(Endpoint::from_environment()?);
        if let Some(path) = std::env::var_os("MLAD_TOKEN_FILE") {
            client = client.with_token_file(Path::new(&path))?;
        }
        Ok(client)
    }

    /// The same with the bearer token in a file: a token is never an argument or a variable.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn with_token_file(mut self, path: &Path) -> Result<Self, ClientError> {
        let token = std::fs::read_to_string(path).map_err(|error| {
            ApiError::new(ErrorCode::BadRequest, format!("the token file {} cannot be read: {error}", path.display()))
        })?;
        self.token = Some(token.trim().to_owned());
        Ok(self)
    }

    /// Where it calls.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    pub(super) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.json(Method::GET, path, Bytes::new()).await
    }

    pub(super) async fn delete(&self, path: &str) -> Result<(), ClientError> {
        self.call(Method::DELETE, path, Bytes::new()).await?.collect(MAX_ANSWER).await.map(drop)
    }

    pub(super) async fn post<B: Serialize, T: DeserializeOwned>(&self, path: &str, body: &B) -> Result<T, ClientError> {
        self.send(Method::POST, path, body).await
    }

    pub(super) async fn send<B: Serialize, T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &B,
    ) -> Result<T, ClientError> {
        self.json(method, path, self.encode(body)?).await
    }

    /// A call with nothing to say and an answer that has no body.
    pub(super) async fn act(&self, path: &str) -> Result<(), ClientError> {
        self.call(Method::POST, path, self.encode(&json!({}))?).await?.collect(MAX_ANSWER).await.map(drop)
    }

    pub(super) async fn stream(&self, path: &str) -> Result<Answer, ClientError> {
        self.call(Method::GET, path, Bytes::new()).await
    }

    fn encode<B: Serialize>(&self, body: &B) -> Result<Bytes, ClientError> {
        serde_json::to_vec(body).map(Bytes::from).map_err(|error| self.misunderstood(error))
    }

    async fn json<T: DeserializeOwned>(&self, method: Method, path: &str, body: Bytes) -> Result<T, ClientError> {
        let bytes = self.call(method, path, body).await?.collect(MAX_ANSWER).await?;
        serde_json::from_slice(&bytes).map_err(|error| self.misunderstood(error))
    }

    async fn call(&self, method: Method, path: &str, body: Bytes) -> Result<Answer, ClientError> {
        let (mut sender, connection) = self.connect().await?;
        let request = self.request(method, path, body)?;
        let response = timeout(ANSWER_TIME, sender.send_request(request))
            .await
            .map_err(|_| self.unreachable(format!("no answer within {} seconds", ANSWER_TIME.as_secs())))?
            .map_err(|error| self.unreachable(error))?;
        self.accept(response, connection).await
    }

    fn request(&self, method: Method, path: &str, body: Bytes) -> Result<Request<Full<Bytes>>, ClientError> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, "mlad")
            .header(ACCEPT, "application/json")
            .header(CONNECTION, "te")
            .header(TE, "trailers")
            .header(USER_AGENT, concat!("mlad/", env!("CARGO_PKG_VERSION")))
            .body(Full::new(body.clone()))
            .map_err(|error| self.misunderstood(error))?;
        if !body.is_empty() {
            request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        }
        if let Some(token) = &self.token {
            let mut value = HeaderValue::from_str(&format!("Bearer {token}"))
                .map_err(|_| ApiError::new(ErrorCode::BadRequest, "the token file does not hold a token"))?;
            value.set_sensitive(true);
            request.headers_mut().insert(AUTHORIZATION, value);
        }
        Ok(request)
    }

    async fn accept(&self, response: Response<Incoming>, connection: JoinHandle<()>) -> Result<Answer, ClientError> {
        let status = response.status();
        let digest = if promises_digest(response.headers()) { Digest::Missing } else { Digest::NotPromised };
        let answer = Answer { body: response.into_body(), endpoint: self.endpoint.to_string(), digest, connection };
        if status.is_success() {
            return Ok(answer);
        }
        let bytes = answer.collect(MAX_ANSWER).await?;
        Err(serde_json::from_slice::<ApiError>(&bytes)
            .map_or_else(|_| self.misunderstood(format!("HTTP status {status}")), ClientError::Api))
    }

    async fn connect(&self) -> Result<(SendRequest<Full<Bytes>>, JoinHandle<()>), ClientError> {
        let connecting = async {
            match &self.endpoint {
                Endpoint::Unix(path) => {
                    self.handshake(UnixStream::connect(path).await.map_err(|e| self.unreachable(e))?).await
                }
                Endpoint::Tcp(address) => {
                    self.handshake(TcpStream::connect(address).await.map_err(|e| self.unreachable(e))?).await
                }
            }
        };
        timeout(CONNECT_TIME, connecting).await.map_err(|_| self.unreachable("connecting took too long"))?
    }

    async fn handshake<S>(&self, stream: S) -> Result<(SendRequest<Full<Bytes>>, JoinHandle<()>), ClientError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| self.unreachable(error))?;
        // An error of the connection reaches the caller through the request or the body.
        Ok((sender, tokio::spawn(async move { drop(connection.await) })))
    }

    fn unreachable(&self, reason: impl ToString) -> ClientError {
        ClientError::Unreachable { endpoint: self.endpoint.to_string(), reason: reason.to_string() }
    }

    fn misunderstood(&self, reason: impl ToString) -> ClientError {
        ClientError::Answer { endpoint: self.endpoint.to_string(), reason: reason.to_string() }
    }
}

impl Answer {
    /// The next piece of the body; none at its end.
    ///
    /// # Errors
    /// When the connection broke before the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        loop {
            match self.body.frame().await {
                None => return Ok(None),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => return Ok(Some(data)),
                    Err(frame) => {
                        if let Some(sum) = frame.trailers_ref().and_then(digest_of) {
                            self.digest = Digest::Sum(sum);
                        }
                    }
                },
                Some(Err(error)) => {
                    return Err(ClientError::Unreachable {
                        endpoint: self.endpoint.clone(),
                        reason: error.to_string(),
                    });
                }
            }
        }
    }

    /// The checksum of the body, once all of it was taken.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    async fn collect(mut self, most: usize) -> Result<Bytes, ClientError> {
        let mut all = BytesMut::new();
        while let Some(piece) = self.next().await? {
            if all.len() + piece.len() > most {
                let reason = format!("more than {most} bytes");
                return Err(ClientError::Answer { endpoint: self.endpoint.clone(), reason });
            }
            all.extend_from_slice(&piece);
        }
        Ok(all.freeze())
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

fn promises_digest(headers: &HeaderMap) -> bool {
    let announced = headers.get_all(TRAILER).iter().filter_map(|value| value.to_str().ok());
    announced.flat_map(|value| value.split(',')).any(|name| name.trim().eq_ignore_ascii_case("content-digest"))
}

/// The SHA-256 among `sha-256=:…:, sha-512=:…:`.
fn digest_of(trailers: &HeaderMap) -> Option<Vec<u8>> {
    let digests = trailers.get("content-digest")?.to_str().ok()?;
    let sum = digests.split(',').find_map(|digest| digest.trim().strip_prefix("sha-256=:")?.strip_suffix(':'))?;
    BASE64.decode(sum.as_bytes()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_read_as_the_rfc_writes_it() {
        let read = |value: &str| {
            digest_of(&HeaderMap::from_iter([("content-digest".parse().unwrap(), value.parse().unwrap())]))
        };
        assert_eq!(read("sha-512=:AAAA:, sha-256=:AQID:"), Some(vec![1, 2, 3]));
        for wrong in ["", "sha-256=AQID", "sha-256=:AQID", "sha-256=:A:", "md5=:AQID:"] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }
}
