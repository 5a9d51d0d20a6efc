//! Clients that do what OpenSSH's does not: signals, a close on the heels of the data, floods.

use super::common::{Person, Site, until};
use russh::{
    ChannelMsg, Disconnect, Sig,
    client::{self, Handle},
    keys::{PrivateKeyWithHashAlg, PublicKeyOrCertificate, load_secret_key},
};
use std::{sync::Arc, time::Duration};
use tokio::time::timeout;

const SOON: Duration = Duration::from_secs(20);

struct Trusting;

impl client::Handler for Trusting {
    type Error = russh::Error;

    async fn check_server_key(&mut self, _: &PublicKeyOrCertificate) -> Result<bool, russh::Error> {
        Ok(true)
    }
}

async fn log_in(site: &Site, person: &Person) -> Handle<Trusting> {
    let mut handle = client::connect(Arc::new(client::Config::default()), site.address, Trusting).await.unwrap();
    let key = Arc::new(load_secret_key(person.path("id_ed25519"), None).unwrap());
    let login = handle.authenticate_publickey("mlad", PrivateKeyWithHashAlg::new(key, None)).await.unwrap();
    assert!(login.success());
    handle
}

/// Reads until standard output contains this; returns all of it.
async fn expect(channel: &mut russh::Channel<client::Msg>, text: &str) -> String {
    let mut seen = Vec::new();
    let reading = async {
        while !String::from_utf8_lossy(&seen).contains(text) {
            match channel.wait().await.unwrap() {
                ChannelMsg::Data { data } => seen.extend_from_slice(&data),
                // A signal goes to the process group, and a shell says on standard error of what its child has died.
                ChannelMsg::ExtendedData { .. } | ChannelMsg::Success | ChannelMsg::WindowAdjusted { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    };
    timeout(SOON, reading).await.unwrap();
    String::from_utf8_lossy(&seen).into_owned()
}

async fn exit_status(channel: &mut russh::Channel<client::Msg>) -> u32 {
    let reading = async {
        loop {
            if let ChannelMsg::ExitStatus { exit_status } = channel.wait().await.expect("it has an exit status") {
                return exit_status;
            }
        }
    };
    timeout(SOON, reading).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn signals_reach_the_process() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let handle = log_in(&site, &alice).await;
    for terminal in [false, true] {
        let mut channel = handle.channel_open_session().await.unwrap();
        if terminal {
            channel.request_pty(false, "xterm", 80, 24, 0, 0, &[]).await.unwrap();
        }
        let script = "trap 'echo got it' USR1; trap 'exit 5' TERM; echo up; while :; do sleep 0.05; done";
        channel.exec(true, script).await.unwrap();
        expect(&mut channel, "up").await;
        // One that is none is ignored.
        channel.signal(Sig::Custom("NONSENSE".into())).await.unwrap();
        channel.signal(Sig::USR1).await.unwrap();
        expect(&mut channel, "got it").await;
        channel.signal(Sig::TERM).await.unwrap();
        assert_eq!(exit_status(&mut channel).await, 5);
    }
}

/// How a client leaves that has sent everything.
#[derive(Debug, Clone, Copy)]
enum Leaving {
    Close,
    Disconnect,
    Vanish,
}

/// What was sent to its end arrives whole, however soon the client is gone: here before the process, or the worker,
/// has begun to read.
#[tokio::test(flavor = "multi_thread")]
async fn input_that_is_whole_arrives_whole_though_the_client_is_gone() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let home = site.backend.agent.home();
    let input: Vec<u8> = (0..3_000_000_u32).flat_map(u32::to_le_bytes).take(3_000_000).collect();
    let handle = log_in(&site, &alice).await;
    // A command in the workspace, and a worker on this host (which in these tests is a shell, too).
    for (place, prefix) in [("workspace", ""), ("worker", "scp -; ")] {
        for leaving in [Leaving::Close, Leaving::Disconnect, Leaving::Vanish] {
            let name = format!("{place}-{leaving:?}");
            let (go, file) = (home.join(format!("{name}-go")), home.join(&name));
            alice.ssh(&format!("mkfifo -m 666 {}", go.display())).await.success();
            let leaver = match leaving {
                Leaving::Close => None,
                Leaving::Disconnect | Leaving::Vanish => Some(log_in(&site, &alice).await),
            };
            let channel = leaver.as_ref().unwrap_or(&handle).channel_open_session().await.unwrap();
            let script = format!("{prefix}read go < {}; cat > {}.part; mv {1}.part {1}", go.display(), file.display());
            channel.exec(false, script).await.unwrap();
            timeout(SOON, channel.data_bytes(input.clone())).await.unwrap().unwrap();
            channel.eof().await.unwrap();
            match leaving {
                Leaving::Close => channel.close().await.unwrap(),
                Leaving::Disconnect => {
                    let bye = leaver.as_ref().unwrap().disconnect(Disconnect::ByApplication, "", "");
                    timeout(SOON, bye).await.unwrap().unwrap();
                }
                Leaving::Vanish => {}
            }
            drop(leaver);
            alice.ssh(&format!("echo go > {}", go.display())).await.success();
            until(&format!("the end of {name}"), || file.exists()).await;
            let written = std::fs::read(&file).unwrap();
            assert!(written == input, "{name}: {} of {} bytes", written.len(), input.len());
        }
    }
}

/// A close without an end of file is a wish to end at once.
#[tokio::test(flavor = "multi_thread")]
async fn input_that_is_not_whole_is_dropped_with_its_channel() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let handle = log_in(&site, &alice).await;
    let mut channel = handle.channel_open_session().await.unwrap();
    channel.exec(false, "echo \"up $$ \"; exec sleep 1000").await.unwrap();
    let said = expect(&mut channel, " \n").await;
    let process = std::path::PathBuf::from(format!("/proc/{}", said.split(' ').nth(1).unwrap()));
    assert!(process.exists());
    channel.data_bytes(vec![0; 200_000]).await.unwrap();
    channel.close().await.unwrap();
    until("the hang-up", || !process.exists()).await;
}
