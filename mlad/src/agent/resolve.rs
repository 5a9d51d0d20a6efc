//! Names to addresses, as the container sees them: `/etc/hosts`, then the name servers of `/etc/resolv.conf`.
//!
//! Not by the C library, which a static binary cannot ask.

use hickory_resolver::{TokioResolver, config::LookupIpStrategy};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use tokio::sync::OnceCell;

/// Resolves names; its configuration is read at the first name.
#[derive(Default)]
pub(super) struct Names {
    resolver: OnceCell<TokioResolver>,
}

impl std::fmt::Debug for Names {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Names")
    }
}

/// Both loopbacks.
const LOOPBACK: [IpAddr; 2] = [IpAddr::V6(Ipv6Addr::LOCALHOST), IpAddr::V4(Ipv4Addr::LOCALHOST)];

impl Names {
    /// All addresses of a name or a literal address, at least one.
    ///
    /// # Errors
    /// A line for a person.
    pub(super) async fn addresses(&self, host: &str) -> Result<Vec<IpAddr>, String> {
        if let Ok(address) = host.parse() {
            return Ok(vec![address]);
        }
        if host.trim_end_matches('.').eq_ignore_ascii_case("localhost") {
            return Ok(LOOPBACK.into());
        }
        let resolver = self.resolver.get_or_try_init(|| async { resolver() }).await?;
        let found = resolver.lookup_ip(host).await.map_err(|error| format!("cannot resolve {host}: {error}"))?;
        let addresses: Vec<IpAddr> = found.iter().collect();
        if addresses.is_empty() { Err(format!("{host} has no address")) } else { Ok(addresses) }
    }
}

fn resolver() -> Result<TokioResolver, String> {
    let wrong = |error| format!("cannot resolve names: /etc/resolv.conf: {error}");
    let mut builder = TokioResolver::builder_tokio().map_err(wrong)?;
    builder.options_mut().ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
    builder.build().map_err(wrong)
}

/// The addresses a listener of RFC 4254 section 7.1 binds; none if it is a name.
pub(super) fn bind_addresses(address: &str) -> Option<Vec<IpAddr>> {
    Some(match address {
        "" | "*" => vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()],
        "localhost" => vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()],
        literal => vec![literal.parse().ok()?],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn literals_and_localhost_need_no_name_server() {
        let names = Names::default();
        assert_eq!(names.addresses("192.0.2.1").await.unwrap(), [IpAddr::from([192, 0, 2, 1])]);
        assert_eq!(names.addresses("LocalHost").await.unwrap(), LOOPBACK);
        assert!(names.resolver.get().is_none());
    }

    #[test]
    fn bind_addresses_are_those_of_the_rfc() {
        assert_eq!(bind_addresses("*"), bind_addresses(""));
        assert_eq!(bind_addresses("").unwrap().len(), 2);
        assert_eq!(bind_addresses("::").unwrap(), [IpAddr::from(Ipv6Addr::UNSPECIFIED)]);
        assert_eq!(bind_addresses("0.0.0.0").unwrap(), [IpAddr::from(Ipv4Addr::UNSPECIFIED)]);
        assert!(bind_addresses("localhost").unwrap().iter().all(IpAddr::is_loopback));
        assert_eq!(bind_addresses("example.org"), None);
    }
}
