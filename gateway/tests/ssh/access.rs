//! Who may not be here any more is not: connections end when their user or key is taken away.

use super::common::{Outcome, Person, Site, until};
use jiff::{Timestamp, ToSpan as _};
use mlad_gateway::store::{KeyToAdd, LastKey};
use std::time::Duration;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::Child,
    time::timeout,
};

const SOON: Duration = Duration::from_secs(400);

/// A connection that sessions share, with one that runs.
pub(crate) struct Master {
    control: String,
    process: Child,
}

impl Master {
    pub(crate) async fn open(person: &Person, name: &str, options: &[&str]) -> Self {
        Self::try_open(person, name, options).await.expect("it is let in")
    }

    /// None if it is not let in.
    pub(crate) async fn try_open(person: &Person, name: &str, options: &[&str]) -> Option<Self> {
        let control = format!("ControlPath={}", person.path(name).display());
        let mut process = person.start(&[&["-o", &control, "-M"], options].concat(), &["echo up; sleep 1000"]);
        let mut lines = BufReader::new(process.stdout.as_mut().unwrap()).lines();
        // A terminal is greeted first.
        let up = async {
            loop {
                match lines.next_line().await.unwrap() {
                    Some(line) if line.trim_end() == "up" => return true,
                    Some(_) => {}
                    None => return false,
                }
            }
        };
        timeout(SOON, up).await.unwrap().then_some(Self { control, process })
    }

    pub(crate) async fn session(&self, person: &Person) -> Outcome {
        // Over this connection or not at all.
        person.ssh_with(&["-o", &self.control, "-o", "ProxyCommand=false"], &["echo in"]).await
    }

    /// Waits until the connection ends; what its person is told.
    pub(crate) async fn ended(self) -> String {
        let ended = timeout(SOON, self.process.wait_with_output()).await.expect("the connection ends");
        Outcome::from(ended.unwrap()).exits(255).stderr
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn disabling_a_user_ends_their_connections_and_nobody_elses() {
    let site = Site::start().await;
    let (alice, bob) = (site.person("alice").await, site.person("bob").await);
    let user = site.store.user_by_name("alice").await.unwrap();
    let (first, second) = (Master::open(&alice, "first", &[]).await, Master::open(&alice, "second", &["-tt"]).await);
    let other = Master::open(&bob, "control", &[]).await;
    assert_eq!(first.session(&alice).await.success().text(), "in");
    site.store.set_user_enabled(user.id, false).await.unwrap();
    for master in [first, second] {
        let told = master.ended().await;
        assert!(told.contains("alice may not log in any more; ask an administrator"), "{told}");
    }
    alice.ssh("true").await.exits(255);
    assert_eq!(other.session(&bob).await.success().text(), "in");
    // And comes back.
    site.store.set_user_enabled(user.id, true).await.unwrap();
    let again = Master::open(&alice, "again", &[]).await;
    assert_eq!(again.session(&alice).await.success().text(), "in");
    assert_eq!(other.session(&bob).await.success().text(), "in");
}

#[tokio::test(flavor = "multi_thread")]
async fn removing_a_key_ends_the_connections_it_let_in() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let user = site.store.user_by_name("alice").await.unwrap();
    let laptop = site.stranger("laptop");
    site.give_key(&user, &laptop).await;
    let (kept, lost) = (Master::open(&alice, "control", &[]).await, Master::open(&laptop, "control", &[]).await);
    let line = mlad::api::NewKey { public_key: laptop.public_key(), label: None, expires_at: None };
    let key = mlad_gateway::ssh::parse_key(&line).unwrap();
    site.store.remove_key(user.id, &key.fingerprint, LastKey::Stays).await.unwrap();
    let told = lost.ended().await;
    assert!(told.contains(&format!("the key {} was removed", key.fingerprint)), "{told}");
    assert_eq!(kept.session(&alice).await.success().text(), "in");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_expires_ends_the_connections_it_let_in_and_lets_nobody_in() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let user = site.store.user_by_name("alice").await.unwrap();
    let guest = site.stranger("guest");
    let line = mlad::api::NewKey { public_key: guest.public_key(), label: None, expires_at: None };
    let key = mlad_gateway::ssh::parse_key(&line).unwrap();
    let kept = Master::open(&alice, "control", &[]).await;
    // On a machine that is busy it may be over before anybody is in.
    let mut lost = None;
    for seconds in [10, 60, 300] {
        let expires_at = Some(Timestamp::now() + seconds.seconds());
        site.store.add_key(user.id, &KeyToAdd { expires_at, ..key.clone() }).await.unwrap();
        lost = Master::try_open(&guest, "control", &[]).await;
        if lost.is_some() {
            break;
        }
        site.store.remove_key(user.id, &key.fingerprint, LastKey::Stays).await.unwrap();
    }
    let lost = lost.expect("a minute is enough");
    let told = lost.ended().await;
    assert!(told.contains(&format!("the key {} has expired", key.fingerprint)), "{told}");
    guest.ssh("true").await.exits(255);
    assert_eq!(kept.session(&alice).await.success().text(), "in");
    let keys = site.store.keys_of(user.id).await.unwrap();
    let used = keys.iter().find(|used| used.fingerprint == key.fingerprint).unwrap();
    assert_eq!(used.last_used_from.as_deref(), Some("127.0.0.1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn removing_a_user_ends_their_connections() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let user = site.store.user_by_name("alice").await.unwrap();
    // One without a session, too.
    let mark = alice.path("in");
    let told = format!("LocalCommand=touch {}", mark.display());
    let mut idle = alice.start(&["-N", "-o", "PermitLocalCommand=yes", "-o", &told], &[]);
    until("the login", || mark.exists()).await;
    let master = Master::open(&alice, "control", &[]).await;
    site.store.remove_user(user.id).await.unwrap();
    let told = master.ended().await;
    assert!(told.contains("was removed; log in with another, or ask an administrator"), "{told}");
    assert_eq!(timeout(SOON, idle.wait()).await.unwrap().unwrap().code(), Some(255));
}
