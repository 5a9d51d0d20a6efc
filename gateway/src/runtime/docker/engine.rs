//! The connection to the container engine: its API version, deadlines, and what its errors mean.

use super::super::RuntimeError;
use bollard::{API_DEFAULT_VERSION, BollardRequest, Docker as Client, errors::Error};
use std::{
    path::{Path, PathBuf},
    sync::{
        PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

/// Deadline of a question to the engine.
pub(super) const QUESTION: Duration = Duration::from_secs(30);
/// Deadline of making, starting or removing a container: minutes on a busy disk.
pub(super) const CHANGE: Duration = Duration::from_secs(180);
/// Deadline of the first words with an engine.
const GREETING: Duration = Duration::from_secs(10);
/// API version of Docker 25, the first that knows CDI devices.
const CDI: ApiVersion = ApiVersion(1, 44);
/// API version of Docker 20.10, the oldest this is tested with.
const OLDEST: ApiVersion = ApiVersion(1, 41);

/// Version of the engine's API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ApiVersion(u32, u32);

impl ApiVersion {
    fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.split_once('.')?;
        Some(Self(major.parse().ok()?, minor.parse().ok()?))
    }
}

/// Why the engine did not do something.
#[derive(Debug, Clone)]
pub(super) enum EngineError {
    /// It does not answer.
    Unavailable(String),
    /// It answered that it will not or cannot.
    Refused {
        /// HTTP status.
        status: u16,
        /// Its words.
        message: String,
    },
}

impl EngineError {
    /// Whether the thing in question is not there.
    pub(super) fn is_absent(&self) -> bool {
        matches!(self, Self::Refused { status: 404, .. })
    }

    /// Whether the thing in question is already there, or in a state that contradicts the request.
    pub(super) fn is_conflict(&self) -> bool {
        matches!(self, Self::Refused { status: 409, .. })
    }

    /// As an error in starting `name`.
    pub(super) fn in_start(self, name: &str) -> RuntimeError {
        match self {
            Self::Unavailable(reason) => RuntimeError::Unavailable(reason),
            Self::Refused { message, .. } => RuntimeError::Start { name: name.to_owned(), reason: message },
        }
    }
}

impl From<EngineError> for RuntimeError {
    /// A refusal of what should always be possible (looking, listing) is a fault of the engine.
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::Unavailable(reason) | EngineError::Refused { message: reason, .. } => {
                Self::Unavailable(reason)
            }
        }
    }
}

/// The engine behind one socket. Finds it anew after it was away.
#[derive(Debug)]
pub(super) struct Engine {
    socket: PathBuf,
    connected: RwLock<Option<Connected>>,
    /// What was last logged about it, so that a change is logged once.
    answers: AtomicBool,
}

/// An engine that has answered.
#[derive(Debug, Clone)]
struct Connected {
    client: Client,
    version: ApiVersion,
}

impl Engine {
    pub(super) fn new(socket: &Path) -> Self {
        Self { socket: socket.to_path_buf(), connected: RwLock::new(None), answers: AtomicBool::new(true) }
    }

    /// Makes one request, or a few that belong together, within `limit`.
    pub(super) async fn call<T, F>(
        &self,
        limit: Duration,
        request: impl FnOnce(Client) -> F + Send,
    ) -> Result<T, EngineError>
    where
        F: Future<Output = Result<T, Error>> + Send,
    {
        let client = self.client().await?;
        let result = match tokio::time::timeout(limit, request(client)).await {
            Ok(result) => result.map_err(|error| self.explain(error)),
            Err(_) => Err(self.unavailable(format!("no answer within {} s", limit.as_secs()))),
        };
        if let Err(EngineError::Unavailable(_)) = result {
            self.forget();
        }
        result
    }

    /// Whether it can be told a CDI device.
    pub(super) async fn knows_cdi(&self) -> Result<bool, EngineError> {
        Ok(self.connected().await?.version >= CDI)
    }

    /// For requests whose answer is a stream; errors go through [`Engine::failed`].
    pub(super) async fn client(&self) -> Result<Client, EngineError> {
        Ok(self.connected().await?.client)
    }

    /// What an error of a stream means; the engine is asked anew after one that means it is away.
    pub(super) fn failed(&self, error: Error) -> EngineError {
        let error = self.explain(error);
        if let EngineError::Unavailable(_) = error {
            self.forget();
        }
        error
    }

    async fn connected(&self) -> Result<Connected, EngineError> {
        if let Some(connected) = self.connected.read().unwrap_or_else(PoisonError::into_inner).as_ref() {
            return Ok(connected.clone());
        }
        let greeting = async { tokio::time::timeout(GREETING, self.greet()).await };
        let result = greeting.await.unwrap_or_else(|_| Err(self.unavailable("it is silent".to_owned())));
        self.report(&result);
        let connected = result?;
        *self.connected.write().unwrap_or_else(PoisonError::into_inner) = Some(connected.clone());
        Ok(connected)
    }

    /// Asks an engine for its version and whether it is one that can serve.
    async fn greet(&self) -> Result<Connected, EngineError> {
        let socket = self.socket.to_string_lossy();
        let plain = Client::connect_with_unix(&socket, CHANGE.as_secs(), API_DEFAULT_VERSION)
            .map_err(|error| self.explain(error))?;
        let answer = plain.version().await.map_err(|error| self.explain(error))?.api_version;
        let ours = ApiVersion(
            u32::try_from(API_DEFAULT_VERSION.major_version).unwrap_or(1),
            u32::try_from(API_DEFAULT_VERSION.minor_version).unwrap_or(0),
        );
        let version = answer
            .as_deref()
            .and_then(ApiVersion::parse)
            .ok_or_else(|| self.unavailable("it does not say which version it is".to_owned()))?
            .min(ours);
        if version < OLDEST {
            return Err(self.unavailable("it is older than Docker 20.10: update it".to_owned()));
        }
        let client = plain.with_request_modifier(move |request| with_version(request, version));
        let options = client.info().await.map_err(|error| self.explain(error))?.security_options.unwrap_or_default();
        // Homes are mounted: a uid must mean the same inside and outside.
        if let Some(option) = options.iter().find(|option| {
            let name = option.split(',').next().unwrap_or_default();
            matches!(name, "name=userns" | "name=rootless")
        }) {
            return Err(self.unavailable(format!(
                "it maps user ids ({option}), and files in homes need the same ids in containers and on the host: \
                 turn userns-remap off, or use an engine that runs as root"
            )));
        }
        Ok(Connected { client, version })
    }

    /// Asks the engine anew before the next request.
    pub(super) fn forget(&self) {
        *self.connected.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn report(&self, result: &Result<Connected, EngineError>) {
        let answered = self.answers.swap(result.is_ok(), Ordering::Relaxed);
        match result {
            Ok(Connected { version: ApiVersion(major, minor), .. }) => {
                tracing::info!(socket = %self.socket.display(), api = %format_args!("{major}.{minor}"), "the container engine answers");
            }
            Err(EngineError::Unavailable(reason) | EngineError::Refused { message: reason, .. }) if answered => {
                tracing::warn!(%reason, "the container engine does not answer; trying again until it does");
            }
            Err(_) => {}
        }
    }

    fn explain(&self, error: Error) -> EngineError {
        match error {
            Error::DockerResponseServerError { status_code: status, message } => {
                EngineError::Refused { status, message }
            }
            Error::DockerStreamError { error: message } => EngineError::Refused { status: 500, message },
            Error::SocketNotFoundError(_) => self.unavailable("there is no such socket".to_owned()),
            other => self.unavailable(innermost(&other)),
        }
    }

    fn unavailable(&self, reason: String) -> EngineError {
        EngineError::Unavailable(format!(
            "{}: {reason}; does it run, and may the gateway reach its socket?",
            self.socket.display()
        ))
    }
}

/// Puts the version in front of the path: bollard leaves it out, and a newer engine would then answer in a
/// newer way than this program knows.
fn with_version(mut request: BollardRequest, ApiVersion(major, minor): ApiVersion) -> BollardRequest {
    let mut parts = request.uri().clone().into_parts();
    let path = parts.path_and_query.as_ref().map_or("/", |path| path.as_str());
    parts.path_and_query = format!("/v{major}.{minor}{path}").parse().ok();
    if let Ok(uri) = hyper::Uri::from_parts(parts) {
        *request.uri_mut() = uri;
    }
    request
}

/// The last cause of an error: the outer ones only say that something failed.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_by_number() {
        assert!(ApiVersion::parse("1.9").unwrap() < OLDEST);
        assert!(ApiVersion::parse("1.44").unwrap() >= CDI);
        assert!(ApiVersion::parse("2.0").unwrap() > CDI);
        assert_eq!(ApiVersion::parse("one"), None);
    }

    #[tokio::test]
    async fn an_engine_that_is_not_there_is_unavailable_and_the_error_says_where() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("docker.sock");
        let engine = Engine::new(&socket);
        for _ in 0..2 {
            match engine.call(QUESTION, |client| async move { client.ping().await }).await {
                Err(EngineError::Unavailable(reason)) => assert!(reason.contains(socket.to_str().unwrap()), "{reason}"),
                other => panic!("{other:?}"),
            }
        }
        // A socket nobody listens at.
        drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
        match engine.call(QUESTION, |client| async move { client.ping().await }).await {
            Err(EngineError::Unavailable(reason)) => assert!(reason.contains("refused"), "{reason}"),
            other => panic!("{other:?}"),
        }
    }
}
