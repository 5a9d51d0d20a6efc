//! The protocol between gateway and agent: frames that mirror the channel messages of RFC 4254.
//!
//! One connection per channel, always dialled by the gateway. Its first frame is [`Frame::Open`]; the agent
//! answers [`Frame::Opened`] or [`Frame::OpenFailure`]. A *session* then speaks frames to its end. Every
//! other kind of channel has nothing but bytes and end-of-file, so after `Opened` its connection is that
//! byte stream itself ([`Connection::into_stream`]). The whole is written down in `docs/agent-protocol.md`.
//!
//! Not here: what agent or gateway do with a frame.

mod codec;
mod connection;
mod relay;

pub use codec::{DecodeError, Exit, Frame, MAX_FRAME, Open, PtySize, Request, VERSION, WINDOW};
pub use connection::{Connection, ConnectionReader, ConnectionWriter, HangUp, MAX_DESCRIPTORS, Peer, Stream, register};
pub use relay::{Line, relay};

use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf};

/// Where the agent listens, inside the container: in a folder only root can enter.
pub const AGENT_SOCKET: &str = "/run/mlad/agent/agent.sock";
/// What the agent is to be, inside the container ([`AgentConfig`] as JSON).
pub const AGENT_CONFIG: &str = "/run/mlad/agent/config.json";
/// What became of a job's command, inside the container ([`JobResult`] as JSON), written before the agent ends.
pub const AGENT_RESULT: &str = "/run/mlad/agent/result.json";
/// Where the HTTP API is served to everybody in the container.
pub const API_SOCKET: &str = "/run/mlad/api.sock";

/// What the gateway tells an agent about its workload, in [`AGENT_CONFIG`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentConfig {
    /// The workload's name.
    pub workload: String,
    /// The user's login name.
    pub user: String,
    /// Uid the user's processes run as.
    pub uid: u32,
    /// Gid the user's processes run as.
    pub gid: u32,
    /// The user's home in the container.
    pub home: PathBuf,
    /// Environment of every process of the user, in addition to the image's.
    pub environment: BTreeMap<String, String>,
    /// The job to run; none for a workspace.
    pub job: Option<JobRun>,
    /// Where gateways on other machines come in; nowhere if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<AgentNetwork>,
}

/// Where an agent is reached from another machine, and how either side is known: TLS 1.3, everything as PEM.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentNetwork {
    /// Address to listen on.
    pub listen: SocketAddr,
    /// The agent's certificate, for the name of its workload.
    pub certificate: String,
    /// Its private key.
    pub key: String,
    /// Whoever shows a certificate for clients of this authority is a gateway.
    pub authority: String,
}

impl std::fmt::Debug for AgentNetwork {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("AgentNetwork").field("listen", &self.listen).finish_non_exhaustive()
    }
}

/// The one command of a job's attempt. Its output goes to `log`; when it ends, so does the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobRun {
    /// Program and arguments.
    pub command: Vec<String>,
    /// Where it starts.
    pub working_directory: PathBuf,
    /// File that takes its standard output and standard error, made by the agent as the user.
    pub log: PathBuf,
    /// Folder for what it wants to keep, made by the agent as the user; in its `MLAD_ARTIFACTS`.
    pub artifacts: PathBuf,
    /// Seconds between SIGTERM and SIGKILL when it is told to end.
    pub grace_seconds: u64,
}

/// What became of a job's command, in [`AGENT_RESULT`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobResult {
    /// How it ended.
    #[serde(flatten)]
    pub exit: Exit,
    /// Whether the kernel killed a process of the container for want of memory while it ran. Engines tell this
    /// too, but apart from the end of a container, and sometimes after it.
    #[serde(default)]
    pub out_of_memory: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_an_exit_and_whether_memory_ran_out() {
        let killed = Exit::Signal { name: "KILL".into(), core_dumped: false, message: String::new() };
        for (result, text) in [
            (JobResult { exit: Exit::Status(4), out_of_memory: false }, r#"{"status":4,"out_of_memory":false}"#),
            (
                JobResult { exit: killed, out_of_memory: true },
                r#"{"signal":{"name":"KILL","core_dumped":false,"message":""},"out_of_memory":true}"#,
            ),
        ] {
            assert_eq!(serde_json::to_string(&result).unwrap(), text);
            assert_eq!(serde_json::from_str::<JobResult>(text).unwrap(), result);
        }
        let older = JobResult { exit: Exit::Status(0), out_of_memory: false };
        assert_eq!(serde_json::from_str::<JobResult>(r#"{"status":0}"#).unwrap(), older, "of an older agent");
        for nothing in ["{}", r#"{"out_of_memory":true}"#, "4"] {
            assert!(serde_json::from_str::<JobResult>(nothing).is_err(), "{nothing}");
        }
    }
}
