//! The rules that keep containers from each other, from the host and from private networks.
//!
//! They stand in nftables tables of our own and match by the name of the bridge, so they hold before the
//! bridge exists, beside whatever iptables (either kind), firewalld or Docker itself have, and whatever
//! those accept: at one hook a drop is final, an acceptance is not.

use super::super::RuntimeError;
use crate::config::{Config, Firewall as Policy, IpNetwork};
use std::{fmt::Write as _, net::IpAddr, path::Path, process::Stdio, time::Duration};
use tokio::{io::AsyncWriteExt as _, process::Command, sync::Mutex};

/// Deadline of one call of `nft`.
const DEADLINE: Duration = Duration::from_secs(20);
/// Where `nft` is looked for when it is not on the path, as is common for services.
const PROGRAMS: [&str; 3] = ["nft", "/usr/sbin/nft", "/sbin/nft"];
/// Networks that are not the outside: this network (RFC 1122), private (RFC 1918), shared (RFC 6598),
/// loopback, link-local with the metadata services of clouds, IETF (Oracle's metadata), benchmarks,
/// multicast, reserved, and Azure's platform address.
const NOT_OUTSIDE_V4: &str = "0.0.0.0/8, 10.0.0.0/8, 100.64.0.0/10, 127.0.0.0/8, 168.63.129.16, 169.254.0.0/16, \
                              172.16.0.0/12, 192.0.0.0/24, 192.168.0.0/16, 198.18.0.0/15, 224.0.0.0/4, 240.0.0.0/4";
/// Likewise: loopback and embedded IPv4, local translation, unique local (with AWS's metadata at
/// fd00:ec2::254), link-local, multicast.
const NOT_OUTSIDE_V6: &str = "::/8, 64:ff9b::/96, 64:ff9b:1::/48, fc00::/7, fe80::/10, ff00::/8";

/// The firewall of one instance's bridge.
#[derive(Debug)]
pub(super) struct Firewall {
    policy: Policy,
    rules: Rules,
    /// The script that was last put in place.
    applied: Mutex<Option<Applied>>,
}

/// What the rules are made of.
#[derive(Debug, Clone, PartialEq)]
struct Rules {
    table: String,
    bridge: String,
    internet: bool,
    allowed: Vec<IpNetwork>,
    blocked: Vec<IpNetwork>,
}

#[derive(Debug, Clone)]
struct Applied {
    script: String,
    between: Between,
}

/// What separates the containers on the bridge from each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Between {
    /// A rule of the bridge family, which sees every frame.
    Frames,
    /// The rule at the forward hook, which needs the kernel's `br_netfilter` to show it the packets.
    Packets,
}

impl Firewall {
    pub(super) fn new(config: &Config, bridge: &str) -> Self {
        let rules = Rules {
            table: format!("mlad_{}", config.instance),
            bridge: bridge.to_owned(),
            internet: config.container.internet,
            allowed: config.docker.allowed_networks.clone(),
            blocked: config.docker.blocked_networks.clone(),
        };
        Self { policy: config.docker.firewall, rules, applied: Mutex::new(None) }
    }

    /// Puts the rules in place, if they are not. Called before every start of a container: somebody may have
    /// flushed them.
    pub(super) async fn apply(&self, name_servers: &[IpAddr]) -> Result<(), RuntimeError> {
        if self.policy == Policy::None {
            return Ok(());
        }
        let mut applied = self.applied.lock().await;
        let script = self.rules.script(name_servers);
        if let Some(applied) = applied.as_ref().filter(|applied| applied.script == script)
            && self.stands(applied.between).await?
        {
            return Ok(());
        }
        run(&["-f", "-"], &script).await?;
        let between = match run(&["-f", "-"], &self.rules.bridge_script()).await {
            Ok(_) => Between::Frames,
            // Kernels without NFT_BRIDGE_META. A refusal, and nothing else, means that: the rules of the first
            // script were just taken.
            Err(Refusal::Failed(_)) => Between::Packets,
            Err(error) => return Err(error.into()),
        };
        tracing::info!(table = %self.rules.table, bridge = %self.rules.bridge, ?between, "firewall rules are in place");
        *applied = Some(Applied { script, between });
        Ok(())
    }

    /// Makes sure, once the bridge exists, that containers on it are separated.
    pub(super) async fn check_bridge(&self) -> Result<(), RuntimeError> {
        let between = self.applied.lock().await.as_ref().map(|applied| applied.between);
        if between != Some(Between::Packets) {
            return Ok(());
        }
        let is_on = |path: &Path| std::fs::read_to_string(path).is_ok_and(|text| text.trim() == "1");
        let shows = |family: &str| {
            let global = format!("/proc/sys/net/bridge/bridge-nf-call-{family}");
            let of_bridge = format!("/sys/class/net/{}/bridge/nf_call_{family}", self.rules.bridge);
            let global = Path::new(&global);
            is_on(global) || (global.exists() && std::fs::write(of_bridge, "1").is_ok())
        };
        // A container has IPv6 addresses of its link, whatever the network has.
        if ["iptables", "ip6tables"].into_iter().all(shows) {
            return Ok(());
        }
        Err(RuntimeError::Host(
            "containers could reach each other: the kernel neither filters bridges by nftables nor has br_netfilter; \
             load it (modprobe br_netfilter)"
                .to_owned(),
        ))
    }

    /// Takes the rules away.
    pub(super) async fn remove(&self) -> Result<(), RuntimeError> {
        if self.policy == Policy::None {
            return Ok(());
        }
        let mut applied = self.applied.lock().await;
        for family in ["inet", "bridge"] {
            let script = format!("add table {family} {0}\ndelete table {family} {0}\n", self.rules.table);
            match run(&["-f", "-"], &script).await {
                // A kernel without that family has no rules in it.
                Err(Refusal::Failed(_)) if family == "bridge" => {}
                result => drop(result?),
            }
        }
        *applied = None;
        Ok(())
    }

    async fn stands(&self, between: Between) -> Result<bool, RuntimeError> {
        Ok(self.rules.stand_in(&run(&["list", "tables"], "").await?, between))
    }
}

impl Rules {
    /// The whole table, put in place of the old one in one transaction.
    fn script(&self, name_servers: &[IpAddr]) -> String {
        let Self { table, bridge, .. } = self;
        format!(
            "add table inet {table}\n\
             delete table inet {table}\n\
             table inet {table} {{\n\
             chain forward {{\n\
             type filter hook forward priority filter - 10; policy accept;\n\
             iifname \"{bridge}\" oifname \"{bridge}\" drop\n\
             iifname \"{bridge}\" goto leaving\n\
             oifname \"{bridge}\" ct state established,related accept\n\
             oifname \"{bridge}\" drop\n\
             }}\n\
             chain input {{\n\
             type filter hook input priority filter - 10; policy accept;\n\
             iifname \"{bridge}\" goto host\n\
             }}\n\
             chain leaving {{\n\
             {leaving}\
             }}\n\
             chain host {{\n\
             {names}\
             ct state established,related accept\n\
             reject with icmpx type admin-prohibited\n\
             }}\n\
             }}\n",
            leaving = self.leaving(name_servers),
            names = self.names(name_servers),
        )
    }

    /// Containers of one bridge from each other, at the level of frames.
    fn bridge_script(&self) -> String {
        let Self { table, bridge, .. } = self;
        format!(
            "add table bridge {table}\n\
             delete table bridge {table}\n\
             table bridge {table} {{\n\
             chain forward {{\n\
             type filter hook forward priority filter; policy accept;\n\
             meta ibrname \"{bridge}\" drop\n\
             }}\n\
             }}\n"
        )
    }

    /// Whether the tables are all among those that `nft` lists.
    fn stand_in(&self, listed: &str, between: Between) -> bool {
        let has = |family: &str| {
            let table = format!("table {family} {}", self.table);
            listed.lines().any(|line| line.trim() == table)
        };
        has("inet") && (between == Between::Packets || has("bridge"))
    }

    /// Where containers may go: name servers, what is allowed, and the outside.
    fn leaving(&self, name_servers: &[IpAddr]) -> String {
        if !self.internet {
            return "reject with icmpx type admin-prohibited\n".to_owned();
        }
        let mut rules = self.names(name_servers);
        for network in &self.blocked {
            let _ = writeln!(
                rules,
                "{} daddr {network} reject with icmpx type admin-prohibited",
                family(network.is_ipv4())
            );
        }
        for network in &self.allowed {
            let _ = writeln!(rules, "{} daddr {network} accept", family(network.is_ipv4()));
        }
        for (family, networks) in [("ip", NOT_OUTSIDE_V4), ("ip6", NOT_OUTSIDE_V6)] {
            let _ = writeln!(rules, "{family} daddr {{ {networks} }} reject with icmpx type admin-prohibited");
        }
        rules
    }

    /// Questions to name servers, and no other service of theirs.
    fn names(&self, name_servers: &[IpAddr]) -> String {
        let mut rules = String::new();
        if self.internet {
            for server in name_servers {
                let family = family(server.is_ipv4());
                let _ = writeln!(rules, "{family} daddr {server} meta l4proto {{ tcp, udp }} th dport 53 accept");
            }
        }
        rules
    }
}

fn family(ipv4: bool) -> &'static str {
    if ipv4 { "ip" } else { "ip6" }
}

/// Why `nft` did not do as told.
#[derive(Debug)]
enum Refusal {
    /// It is not installed.
    Missing,
    /// It says no.
    Failed(String),
    /// It did not come to an answer.
    Broken(String),
}

impl From<Refusal> for RuntimeError {
    fn from(refusal: Refusal) -> Self {
        Self::Host(match refusal {
            Refusal::Missing => "the program nft is missing, and without it containers could reach this host and each \
                                 other: install nftables, or set docker.firewall = \"none\" if something else keeps \
                                 them apart"
                .to_owned(),
            Refusal::Broken(reason) => format!(
                "nobody knows whether the firewall rules of the containers are in place: {reason}; it is tried again \
                 with the next container"
            ),
            Refusal::Failed(reason) => format!(
                "the firewall rules of the containers cannot be put in place: {reason}; the gateway needs \
                 CAP_NET_ADMIN and a kernel with nf_tables"
            ),
        })
    }
}

/// Runs `nft` with `input`; returns what it printed.
async fn run(arguments: &[&str], input: &str) -> Result<String, Refusal> {
    for program in PROGRAMS {
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn();
        let mut child = match child {
            Ok(child) => child,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(Refusal::Broken(format!("{program} cannot be started: {error}"))),
        };
        let talk = async move {
            if let Some(mut stdin) = child.stdin.take() {
                // If it ended before it read everything, it says why.
                let _ = stdin.write_all(input.as_bytes()).await;
            }
            child.wait_with_output().await
        };
        let output = tokio::time::timeout(DEADLINE, talk)
            .await
            .map_err(|_| Refusal::Broken(format!("nft did not end within {} s", DEADLINE.as_secs())))?
            .map_err(|error| Refusal::Broken(format!("nft: {error}")))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let reason = || text(&output.stderr).lines().next().unwrap_or("nft failed").to_owned();
        return match output.status.code() {
            Some(0) => Ok(text(&output.stdout)),
            Some(_) => Err(Refusal::Failed(reason())),
            None => Err(Refusal::Broken(format!("nft: {}", output.status))),
        };
    }
    Err(Refusal::Missing)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> Rules {
        Rules {
            table: "mlad_test".into(),
            bridge: "br-test".into(),
            internet: true,
            allowed: vec!["10.1.0.0/16".parse().unwrap(), "fd00:1::/32".parse().unwrap()],
            blocked: vec!["203.0.113.0/24".parse().unwrap()],
        }
    }

    #[test]
    fn what_is_blocked_comes_before_what_is_allowed_and_that_before_what_is_private() {
        let script = rules().script(&[IpAddr::from([169, 254, 169, 253])]);
        let at = |text: &str| script.find(text).unwrap_or_else(|| panic!("{text} is not in {script}"));
        let name_server = at("ip daddr 169.254.169.253 meta l4proto { tcp, udp } th dport 53 accept");
        let blocked = at("ip daddr 203.0.113.0/24 reject");
        let allowed = at("ip daddr 10.1.0.0/16 accept");
        at("ip6 daddr fd00:1::/32 accept");
        assert!(name_server < blocked && blocked < allowed && allowed < at(NOT_OUTSIDE_V4));
    }

    #[test]
    fn losing_only_the_table_between_containers_is_noticed() {
        let (both, one) =
            ("table inet other\ntable bridge mlad_test\ntable inet mlad_test\n", "table inet mlad_test\n");
        assert!(rules().stand_in(both, Between::Frames));
        assert!(!rules().stand_in(one, Between::Frames));
        assert!(rules().stand_in(one, Between::Packets), "there is none to lose");
        assert!(!rules().stand_in("table bridge mlad_test\ntable inet mlad_test2\n", Between::Packets));
    }

    #[test]
    fn without_the_outside_nothing_is_accepted() {
        let rules = Rules { internet: false, ..rules() };
        let leaving = rules.leaving(&[IpAddr::from([9, 9, 9, 9])]);
        assert_eq!(leaving, "reject with icmpx type admin-prohibited\n");
        assert!(!rules.script(&[IpAddr::from([9, 9, 9, 9])]).contains("9.9.9.9"));
    }
}
