//! OpenSSH's server in a container of the base image: what the gateway is held against.

use crate::{Person, Site, eventually};
use std::{fs, path::PathBuf, time::Duration};

/// Longest time from its start to its first answer.
const START: Duration = Duration::from_secs(60);
/// Its settings. What the gateway decides otherwise on purpose is set to the gateway's way: any variable is taken,
/// and as many sessions at once as a test needs.
const SETTINGS: &str = "\
UsePAM no
UseDNS no
PrintMotd no
PrintLastLog no
X11Forwarding no
MaxStartups 100
MaxSessions 100
AcceptEnv *
SetEnv PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
Subsystem sftp /usr/lib/openssh/sftp-server
";

/// A running server for one person: the same name, uid, home, shell and host name as in their workspace, in another
/// container. Gone when dropped.
#[derive(Debug)]
pub struct Sshd<'a> {
    site: &'a Site,
    name: String,
    /// The person, as they reach it.
    pub person: Person,
}

impl<'a> Sshd<'a> {
    /// Starts it. The person's workspace is started, too, if it does not run.
    ///
    /// # Panics
    /// When `MLAD_TEST_SSHD` is not set, or it does not start.
    pub fn start(site: &'a Site, person: &Person) -> Self {
        let files = std::env::var_os("MLAD_TEST_SSHD").map(PathBuf::from);
        let files = files.unwrap_or_else(|| panic!("MLAD_TEST_SSHD is not set: run this by scripts/test e2e"));
        let account = person.ssh_inside("id -un; id -u; id -g; hostname").success().text();
        let [user, uid, gid, host] = account.lines().collect::<Vec<_>>()[..] else { panic!("{account:?}") };
        let key = fs::read_to_string(person.public_key()).unwrap();
        let start = format!(
            "set -e\n\
             groupadd -g {gid} {user}\n\
             useradd -m -u {uid} -g {gid} -p '*' -s /bin/bash {user}\n\
             rm -f /home/{user}/.bash* /home/{user}/.profile\n\
             mkdir -p /home/{user}/.ssh /run/sshd\n\
             printf '%s' '{key}' > /home/{user}/.ssh/authorized_keys\n\
             chown -R {user}: /home/{user}\n\
             printf '%s' '{SETTINGS}' > /etc/ssh/sshd_config\n\
             useradd -r -d /run/sshd -s /usr/sbin/nologin sshd\n\
             ssh-keygen -q -A\n\
             exec /usr/sbin/sshd -D -e"
        );
        let name = format!("{}-sshd-{user}", site.instance());
        // Its end also ends what was half started.
        let mut sshd = Self { site, name: name.clone(), person: person.clone() };
        site.docker(&["network", "create", &name]).success();
        let create = ["create", "--name", &name, "--network", &name, "--hostname", host, "mlad/base:1"];
        site.docker(&[&create[..], &["sh", "-c", &start]].concat()).success();
        site.docker(&["cp", &format!("{}/.", files.display()), &format!("{name}:/")]).success();
        site.docker(&["start", &name]).success();
        let template = format!("{{{{(index .NetworkSettings.Networks \"{name}\").IPAddress}}}}");
        let address = site.docker(&["inspect", "-f", &template, &name]).success().text();
        sshd.person = person.elsewhere("sshd", &address, 22, user);
        eventually("sshd answers", START, || sshd.person.ssh("true").code == 0);
        sshd
    }

    /// The name of its container.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for Sshd<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("sshd said: {}", self.site.docker(&["logs", "--tail", "20", &self.name]).stderr);
        }
        self.site.docker(&["rm", "-f", &self.name]);
        self.site.docker(&["network", "rm", &self.name]);
    }
}
