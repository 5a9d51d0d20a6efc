//! The network of the containers: one bridge of our own, and the name servers that are asked from it.

use super::{
    super::{RuntimeError, workload::LABEL_INSTANCE},
    engine::{CHANGE, Engine, EngineError, QUESTION},
};
use crate::config::Config;
use bollard::{
    models::{Ipam, IpamConfig, NetworkCreateRequest, NetworkInspect},
    query_parameters::InspectNetworkOptions,
};
use sha2::{Digest as _, Sha256};
use std::{collections::HashMap, net::IpAddr, path::Path};
use tokio::sync::Mutex;

/// Longest name of a network device.
const MAX_DEVICE: usize = 15;
/// Longest name of an instance.
const MAX_INSTANCE: usize = 16;
const OPTION_BRIDGE: &str = "com.docker.network.bridge.name";
const OPTION_BETWEEN: &str = "com.docker.network.bridge.enable_icc";
/// Most name servers a resolver takes.
const MAX_NAME_SERVERS: usize = 3;

/// The network of one instance.
#[derive(Debug)]
pub(super) struct Network {
    /// Its name, which is the instance's.
    name: String,
    bridge: String,
    subnet: Option<String>,
    internet: bool,
    /// One at a time: engines allow two networks of one name.
    making: Mutex<()>,
}

impl Network {
    pub(super) fn new(config: &Config) -> Result<Self, RuntimeError> {
        // Both names become part of firewall rules.
        let instance = &config.instance;
        if instance.is_empty()
            || instance.len() > MAX_INSTANCE
            || !instance.bytes().all(|byte| is_plain(byte) && byte != b'-')
        {
            return Err(RuntimeError::Host(format!(
                "instance: {instance:?} cannot name one: lower-case letters and digits, at most {MAX_INSTANCE}"
            )));
        }
        let bridge = config.docker.bridge.clone().unwrap_or_else(|| bridge_of(instance));
        if bridge.is_empty() || bridge.len() > MAX_DEVICE || !bridge.bytes().all(is_plain) {
            return Err(RuntimeError::Host(format!(
                "docker.bridge: {bridge:?} cannot name a bridge: lower-case letters, digits and hyphens, at most {MAX_DEVICE}"
            )));
        }
        Ok(Self {
            name: config.instance.clone(),
            bridge,
            subnet: config.docker.subnet.map(|subnet| subnet.to_string()),
            internet: config.container.internet,
            making: Mutex::new(()),
        })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn bridge(&self) -> &str {
        &self.bridge
    }

    /// Makes the network if it is not there; makes it anew if it has other settings and nobody is on it.
    pub(super) async fn ensure(&self, engine: &Engine) -> Result<(), RuntimeError> {
        let _turn = self.making.lock().await;
        if let Some(found) = self.inspect(engine).await? {
            let Some(difference) = self.difference(&found) else { return Ok(()) };
            if found.containers.is_some_and(|containers| !containers.is_empty()) {
                return Err(RuntimeError::Host(format!(
                    "the network {} was made with other settings ({difference}), and containers are on it: end them \
                     first, or name another instance",
                    self.name
                )));
            }
            tracing::info!(network = %self.name, %difference, "the containers' network is made anew");
            self.remove(engine).await?;
        }
        let wish = self.wish();
        match engine.call(CHANGE, |client| async move { client.create_network(wish).await }).await {
            Ok(_) => {
                tracing::info!(network = %self.name, bridge = %self.bridge, internet = self.internet, "the containers' network is made");
                Ok(())
            }
            Err(EngineError::Refused { message, .. }) => {
                Err(RuntimeError::Host(format!("the containers' network {} cannot be made: {message}", self.name)))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Removes it. No such network is no error.
    pub(super) async fn remove(&self, engine: &Engine) -> Result<(), RuntimeError> {
        let Some(found) = self.inspect(engine).await? else { return Ok(()) };
        // By its id: by then another could have the name.
        let id = found.id.unwrap_or_else(|| self.name.clone());
        match engine.call(CHANGE, |client| async move { client.remove_network(&id).await }).await {
            Err(error) if !error.is_absent() => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// The network of this instance, if it is there.
    async fn inspect(&self, engine: &Engine) -> Result<Option<NetworkInspect>, RuntimeError> {
        let name = self.name.clone();
        let question =
            |client: bollard::Docker| async move { client.inspect_network(&name, None::<InspectNetworkOptions>).await };
        match engine.call(QUESTION, question).await {
            // The engine takes the beginning of an id for a name, too.
            Ok(found) if found.name.as_ref() != Some(&self.name) => Ok(None),
            Ok(found) if is_ours(&found, &self.name) => Ok(Some(found)),
            Ok(_) => Err(RuntimeError::Host(format!(
                "the engine has a network {0} that is not this gateway's (it lacks the label {LABEL_INSTANCE}={0}), and \
                 it is left alone: rename or remove it, or give the gateway another instance",
                self.name
            ))),
            Err(error) if error.is_absent() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn wish(&self) -> NetworkCreateRequest {
        NetworkCreateRequest {
            name: self.name.clone(),
            driver: Some("bridge".to_owned()),
            internal: Some(!self.internet),
            attachable: Some(false),
            enable_ipv6: Some(false),
            ipam: self.subnet.as_ref().map(|subnet| Ipam {
                config: Some(vec![IpamConfig { subnet: Some(subnet.clone()), ..IpamConfig::default() }]),
                ..Ipam::default()
            }),
            options: Some(HashMap::from([
                (OPTION_BRIDGE.to_owned(), self.bridge.clone()),
                (OPTION_BETWEEN.to_owned(), "false".to_owned()),
            ])),
            labels: Some(HashMap::from([(LABEL_INSTANCE.to_owned(), self.name.clone())])),
            ..NetworkCreateRequest::default()
        }
    }

    /// What is different about the network that is there.
    fn difference(&self, found: &NetworkInspect) -> Option<String> {
        let option = |name: &str| found.options.as_ref().and_then(|options| options.get(name)).map(String::as_str);
        let subnet = || {
            let configs = found.ipam.as_ref()?.config.as_deref()?;
            configs.first()?.subnet.as_deref()
        };
        if found.driver.as_deref() != Some("bridge") {
            return Some("it is not a bridge".to_owned());
        }
        if option(OPTION_BRIDGE) != Some(&self.bridge) {
            return Some(format!("its bridge is not {}", self.bridge));
        }
        if option(OPTION_BETWEEN) != Some("false") {
            return Some("containers on it reach each other".to_owned());
        }
        if found.internal.unwrap_or(false) == self.internet {
            return Some("the setting container.internet has changed".to_owned());
        }
        if found.enable_ipv6 == Some(true) {
            return Some("it has IPv6".to_owned());
        }
        if self.subnet.is_some() && self.subnet.as_deref() != subnet() {
            return Some("the setting docker.subnet has changed".to_owned());
        }
        None
    }
}

/// The name servers of the containers: those of the settings, or those of the host. None if the host asks
/// one of its own at a loopback address: the engine then forwards questions from the host.
pub(super) fn name_servers(config: &Config) -> Vec<IpAddr> {
    if !config.docker.dns.is_empty() {
        return config.docker.dns.clone();
    }
    ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"]
        .into_iter()
        .map(|path| parse_name_servers(&std::fs::read_to_string(Path::new(path)).unwrap_or_default()))
        .find(|servers| !servers.is_empty())
        .unwrap_or_default()
}

/// Name servers of a `resolv.conf` that a container can ask: it has IPv4, and its loopback is its own.
fn parse_name_servers(text: &str) -> Vec<IpAddr> {
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"))
        .filter_map(|rest| rest.split_whitespace().next()?.parse().ok())
        .filter(|address: &IpAddr| address.is_ipv4() && !address.is_loopback() && !address.is_unspecified())
        .take(MAX_NAME_SERVERS)
        .collect()
}

fn is_ours(found: &NetworkInspect, instance: &str) -> bool {
    found.labels.as_ref().and_then(|labels| labels.get(LABEL_INSTANCE)).is_some_and(|label| label == instance)
}

fn is_plain(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-'
}

/// A bridge name for an instance: readable if there is room, and never that of another.
fn bridge_of(instance: &str) -> String {
    let plain = format!("br-{instance}");
    if plain.len() <= MAX_DEVICE {
        return plain;
    }
    let digest = data_encoding::HEXLOWER.encode(&Sha256::digest(instance.as_bytes()));
    format!("br-{}", digest.chars().take(MAX_DEVICE - 3).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bridges_have_names_that_devices_can_have() {
        assert_eq!(bridge_of("mlad"), "br-mlad");
        assert_eq!(bridge_of("twelveletter"), "br-twelveletter");
        let (one, other) = (bridge_of("instance00000001"), bridge_of("instance00000002"));
        assert_eq!((one.len(), other.len()), (15, 15));
        assert_ne!(one, other);
    }

    #[test]
    fn only_name_servers_a_container_can_ask_are_taken() {
        let text = "# nameserver 1.1.1.1\nnameserver 127.0.0.53\nnameserver 10.0.0.2 \n nameserver 9.9.9.9\n\
                    nameserver fe80::1%eth0\nnameserver 2001:db8::1\nsearch example.org\nnameserver\n";
        assert_eq!(parse_name_servers(text), [IpAddr::from([10, 0, 0, 2]), IpAddr::from([9, 9, 9, 9])]);
        assert!(parse_name_servers("nameserver 127.0.0.1\n").is_empty());
    }
}
