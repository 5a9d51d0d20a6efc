//! What travels between a node's daemon and the allocator: frames of JSON, each after its length in four bytes.

use crate::node::{Change, Device, DriverError, Listed, Reading, Report};
use axum::body::Bytes;
use futures::{SinkExt, StreamExt};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{io, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};
use tokio_util::codec::{Framed, LengthDelimitedCodec};

/// The protocol spoken here.
pub(super) const VERSION: u32 = 1;
/// The longest frame, in bytes: a reading of a GPU has some thousand.
const LONGEST: usize = 1 << 20;
/// How long writing a frame may take.
const WRITE: Duration = Duration::from_secs(10);
/// The most GPUs of a node, and the most instances or profiles of a GPU; beyond what is built.
const MOST_GPUS: usize = 256;
const MOST_INSTANCES: usize = 64;
const MOST_PROFILES: usize = 64;
/// The longest name, and the longest reason, in bytes.
const LONGEST_NAME: usize = 256;
const LONGEST_REASON: usize = 512;

/// What a daemon says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum FromNode {
    /// First of all: who it is.
    Hello(Hello),
    /// It renews its lease; the number is answered.
    Renew(u64),
    /// What its GPUs' threads report.
    Report(Report),
}

/// Who a daemon is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Hello {
    pub(super) version: u32,
    pub(super) node: String,
    pub(super) machine: String,
    pub(super) boot: String,
    pub(super) stopped: bool,
}

/// What a daemon is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum ToNode {
    /// It has joined under this fence; its lease lasts so long from when it said hello.
    Welcome {
        /// The fence.
        fence: u64,
        /// How long its lease lasts, in milliseconds.
        lease_ms: u64,
    },
    /// It may not, or no longer, speak for the node.
    Refused {
        /// Why.
        reason: String,
        /// It may again, once it has ended what runs.
        stop_first: bool,
    },
    /// Its lease lasts from when it sent this number.
    Renewed(u64),
    /// What a GPU's thread is to do.
    Order {
        /// The GPU's UUID.
        gpu: String,
        /// What.
        task: Task,
    },
}

/// What a GPU's thread is to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Task {
    /// Read the GPU.
    Read,
    /// Change what is on it.
    Change(Change),
}

/// A connection, frame by frame.
pub(super) type Frames<S> = Framed<S, LengthDelimitedCodec>;

/// Frames over a connection.
pub(super) fn frames<S: AsyncRead + AsyncWrite>(stream: S) -> Frames<S> {
    LengthDelimitedCodec::builder().max_frame_length(LONGEST).new_framed(stream)
}

/// Sends a frame.
///
/// # Errors
/// When the connection is gone, or takes nothing for too long.
pub(super) async fn send<S: AsyncRead + AsyncWrite + Unpin>(
    frames: &mut Frames<S>,
    what: &impl Serialize,
) -> io::Result<()> {
    let bytes = serde_json::to_vec(what).map_err(io::Error::other)?;
    timeout(WRITE, frames.send(Bytes::from(bytes))).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// Receives a frame. Can be cut off without losing anything.
///
/// # Errors
/// When the connection is gone, or what came is no such frame.
pub(super) async fn receive<T: DeserializeOwned, S: AsyncRead + AsyncWrite + Unpin>(
    frames: &mut Frames<S>,
) -> io::Result<T> {
    let frame = frames.next().await.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))??;
    serde_json::from_slice(&frame).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// A report as it may be taken in: within bounds, its texts cut to theirs.
///
/// # Errors
/// What is beyond all bounds.
pub(super) fn checked(report: Report) -> Result<Report, &'static str> {
    Ok(match report {
        Report::Down(error) => Report::Down(cut(error)),
        Report::Listed(listed) if listed.len() > MOST_GPUS => return Err("it lists more GPUs than there can be"),
        Report::Listed(listed) => {
            let one = |Listed { index, uuid }: Listed| {
                let fine = uuid.as_ref().map_or(true, |uuid| is_identifier(uuid));
                let uuid = uuid.map_err(cut);
                fine.then_some(Listed { index, uuid }).ok_or("it lists a GPU with an impossible UUID")
            };
            Report::Listed(listed.into_iter().map(one).collect::<Result<_, _>>()?)
        }
        Report::Gpu { uuid, reading, change } => {
            if !is_identifier(&uuid) || reading.as_ref().is_ok_and(|reading| !is_plausible(reading, &uuid)) {
                return Err("it reports a GPU that cannot be");
            }
            let change = change.map(|(id, result)| {
                let result = result.map_err(|failure| crate::node::Failure { error: cut(failure.error), ..failure });
                (id, result)
            });
            Report::Gpu { uuid, reading: reading.map_err(cut), change }
        }
        Report::Xid { gpu, .. } if !is_identifier(&gpu) => return Err("it reports an error of an impossible GPU"),
        Report::Xid { gpu, xid } => Report::Xid { gpu, xid },
    })
}

/// A UUID, a machine's or a boot's number: visible ASCII, not too long.
pub(super) fn is_identifier(text: &str) -> bool {
    (1..=LONGEST_NAME).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

fn is_plausible(reading: &Reading, uuid: &str) -> bool {
    let is_name = |name: &str| name.len() <= LONGEST_NAME && !name.contains(char::is_control);
    let profiles = reading.model.profiles();
    let device = |device: &Device| match device {
        Device::Whole(uuid) => is_identifier(uuid),
        Device::Missing | Device::Split => true,
    };
    reading.uuid == uuid
        && is_name(&reading.model.name)
        && profiles.len() <= MOST_PROFILES
        && profiles.iter().all(|profile| is_name(&profile.name))
        && reading.instances.len() <= MOST_INSTANCES
        && reading.instances.iter().all(|instance| device(&instance.device))
}

fn cut(error: DriverError) -> DriverError {
    let short = |text: String| text.chars().filter(|char| !char.is_control()).take(LONGEST_REASON).collect();
    match error {
        DriverError::Absent(text) => DriverError::Absent(short(text)),
        DriverError::Lost(text) => DriverError::Lost(short(text)),
        DriverError::Other(text) => DriverError::Other(short(text)),
        error => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{geometry::facts, node::Instance};
    use mlad::api::Placement;
    use proptest::prelude::*;

    fn reading(key: &str) -> Reading {
        let instance = Instance {
            id: 3,
            profile: 19,
            placement: Placement { start: 4, size: 1 },
            device: Device::Whole("MIG-1".to_owned()),
            processes: 2,
        };
        Reading { index: 0, uuid: "GPU-1".to_owned(), model: facts::model(key), instances: vec![instance] }
    }

    fn report(reading: Reading) -> Report {
        Report::Gpu { uuid: reading.uuid.clone(), reading: Ok(reading), change: None }
    }

    #[tokio::test]
    async fn a_reading_arrives_as_it_was() {
        for key in ["A100-40GB", "H100-80GB", "A30-24GB"] {
            let (near, far) = tokio::io::duplex(64);
            let (mut near, mut far) = (frames(near), frames(far));
            let sent = FromNode::Report(report(reading(key)));
            let (_, got) = tokio::join!(async { send(&mut near, &sent).await.unwrap() }, receive(&mut far));
            let FromNode::Report(got) = got.unwrap() else { panic!("another frame") };
            let Ok(Report::Gpu { reading: Ok(got), .. }) = checked(got) else { panic!("not taken in") };
            assert_eq!(got, reading(key));
        }
    }

    #[test]
    fn what_cannot_be_is_not_taken_in() {
        assert!(checked(report(reading("A100-40GB"))).is_ok());
        let other = Reading { uuid: "GPU-2".to_owned(), ..reading("A100-40GB") };
        assert!(checked(Report::Gpu { uuid: "GPU-1".to_owned(), reading: Ok(other), change: None }).is_err());
        let mut many = reading("A100-40GB");
        many.instances = vec![many.instances[0].clone(); MOST_INSTANCES + 1];
        assert!(checked(report(many)).is_err());
        let mut named = reading("A100-40GB");
        named.instances[0].device = Device::Whole("MIG-\u{1b}[2J".to_owned());
        assert!(checked(report(named)).is_err());
        let gpus = (0..300).map(|index| Listed { index, uuid: Ok(format!("GPU-{index}")) }).collect();
        assert!(checked(Report::Listed(gpus)).is_err());
        let Ok(Report::Down(DriverError::Other(text))) = checked(Report::Down(DriverError::Other("x\n".repeat(9999))))
        else {
            panic!("another report")
        };
        assert_eq!(text, "x".repeat(LONGEST_REASON));
    }

    proptest! {
        #[test]
        fn whatever_comes_is_refused_or_within_bounds(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            if let Ok(FromNode::Report(report)) = serde_json::from_slice(&bytes) {
                drop(checked(report));
            }
        }
    }
}
