//! What a container reaches: the outside, and nothing else.
//!
//! There is no outside here, so one is made: a network namespace beyond the host, with a public address, a
//! private one, and the address of a cloud's metadata service. The same questions are asked without the
//! firewall, so that an answer "closed" is known to be its doing.

use crate::stage::{self, Stage, run};
use mlad_gateway::config::Firewall;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::{
    fs::File,
    net::{IpAddr, Ipv4Addr, TcpListener, UdpSocket},
    os::fd::AsFd as _,
    process::Command,
    thread,
};

const METADATA: &str = "169.254.169.254";

/// Another machine, on the far side of the host.
struct Beyond {
    name: String,
    host: Ipv4Addr,
    public: Ipv4Addr,
    private: Ipv4Addr,
}

impl Beyond {
    fn new() -> Self {
        let id = std::process::id();
        let host = Ipv4Addr::from(u32::from(Ipv4Addr::new(198, 51, 100, 0)) + (id % 64) * 4 + 1);
        let public = Ipv4Addr::from(u32::from(host) + 1);
        let private = Ipv4Addr::new(10, 213, u8::try_from(id % 250).unwrap(), 7);
        let name = format!("vb{id}");
        let beyond = Self { name, host, public, private };
        let script = format!(
            "ip netns add {0}; ip link add {0} type veth peer name eth0 netns {0}; \
             ip addr add {host}/30 dev {0}; ip link set {0} up; \
             ip -n {0} addr add {public}/30 dev eth0; ip -n {0} addr add {private}/32 dev eth0; \
             ip -n {0} addr add {METADATA}/32 dev eth0; ip -n {0} link set eth0 up; ip -n {0} link set lo up; \
             ip -n {0} route add default via {host}; \
             ip route replace {private}/32 via {public}; ip route replace {METADATA}/32 via {public}",
            beyond.name
        );
        run(Command::new("sh").args(["-ec", &script]));
        beyond.serve();
        beyond
    }

    /// HTTP's port, and a name server that knows one address.
    fn serve(&self) {
        let namespace = File::open(format!("/run/netns/{}", self.name)).unwrap();
        let address = self.private;
        let (tcp, udp) = thread::spawn(move || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            (TcpListener::bind("0.0.0.0:80").unwrap(), UdpSocket::bind((address, 53)).unwrap())
        })
        .join()
        .unwrap();
        thread::spawn(move || tcp.incoming().for_each(drop));
        thread::spawn(move || {
            let mut question = [0; 512];
            while let Ok((count, from)) = udp.recv_from(&mut question) {
                let end = question[12..count].iter().position(|byte| *byte == 0).unwrap() + 12 + 5;
                let mut answer = question[..end].to_vec();
                answer[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 203, 0, 113, 77]);
                let _ = udp.send_to(&answer, from);
            }
        });
    }
}

impl Drop for Beyond {
    fn drop(&mut self) {
        let script = format!(
            "ip route del {0}/32 via {1}; ip route del {METADATA}/32 via {1}; ip link del {2}; ip netns del {2}",
            self.private, self.public, self.name
        );
        let _ = Command::new("sh").args(["-c", &script]).status();
    }
}

/// Everything a container might try, each with the way to it.
struct Targets {
    neighbour: String,
    host: Vec<String>,
    metadata: String,
    private: String,
    public: String,
}

async fn two_containers(stage: &Stage, beyond: &Beyond) -> (Targets, TcpListener) {
    for name in ["w-1-1", "w-2-1"] {
        stage.start(&stage.spec(name).await).await;
    }
    assert_eq!(stage.tell("w-2-1", "serve 8080").await, "done");
    assert_eq!(stage.tell("w-2-1", "tcp 127.0.0.1:8080").await, "open");
    let service = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = service.local_addr().unwrap().port();
    let of_network =
        |format: &str| stage.cli(&["network", "inspect", "-f", format, &stage.config.instance]).trim().to_owned();
    let gateway = of_network("{{(index .IPAM.Config 0).Gateway}}");
    let address = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}";
    let neighbour = stage.cli(&["inspect", "-f", address, &stage.container("w-2-1")]).trim().to_owned();
    let mut host = vec![format!("{gateway}:{port}"), format!("{}:{port}", beyond.host)];
    host.extend(own_addresses().map(|address| format!("{address}:{port}")));
    let targets = Targets {
        neighbour: format!("{neighbour}:8080"),
        host,
        metadata: format!("{METADATA}:80"),
        private: format!("{}:80", beyond.private),
        public: format!("{}:80", beyond.public),
    };
    (targets, service)
}

/// Addresses of the host, Docker's own bridges included.
fn own_addresses() -> impl Iterator<Item = IpAddr> {
    let text = run(Command::new("ip").args(["-4", "-o", "addr", "show", "scope", "global"]));
    let addresses: Vec<IpAddr> = text
        .lines()
        .filter_map(|line| {
            line.split_whitespace().skip_while(|word| *word != "inet").nth(1)?.split('/').next()?.parse().ok()
        })
        .collect();
    addresses.into_iter()
}

async fn is_open(stage: &Stage, address: &str) -> bool {
    match stage.tell("w-1-1", &format!("tcp {address}")).await.as_str() {
        "open" => true,
        answer => {
            assert!(answer.starts_with("closed"), "{address}: {answer}");
            false
        }
    }
}

#[tokio::test]
async fn a_container_reaches_the_outside_and_nothing_else() {
    let Some(engine) = stage::engine() else { return };
    let beyond = Beyond::new();

    // Without: the way to each target exists.
    let stage = Stage::new(&engine, |config| config.docker.firewall = Firewall::None).await;
    let (targets, service) = two_containers(&stage, &beyond).await;
    for target in targets.host.iter().chain([&targets.metadata, &targets.private, &targets.public]) {
        assert!(is_open(&stage, target).await, "{target}");
    }
    drop((stage, service));

    // With.
    let stage = Stage::new(&engine, |config| config.docker.dns = vec![beyond.private.into()]).await;
    let (targets, service) = two_containers(&stage, &beyond).await;
    assert!(is_open(&stage, &targets.public).await);
    for target in targets.host.iter().chain([&targets.metadata, &targets.private, &targets.neighbour]) {
        assert!(!is_open(&stage, target).await, "{target}");
    }
    service.set_nonblocking(true).unwrap();
    assert!(service.accept().is_err());
    // The name server has a private address: its port for names is open, and no other.
    let answer = stage.tell("w-1-1", "name 127.0.0.11:53").await;
    assert!(answer.contains("203, 0, 113, 77"), "{answer}");
    let answer = stage.tell("w-1-1", &format!("udp {METADATA}:53")).await;
    assert!(answer.starts_with("closed"), "{answer}");

    // Somebody flushes the rules: the next start puts them back.
    run(Command::new("nft").args(["delete", "table", "inet", &format!("mlad_{}", stage.config.instance)]));
    assert!(is_open(&stage, &targets.host[0]).await);
    stage.start(&stage.spec("w-3-1").await).await;
    assert!(!is_open(&stage, &targets.host[0]).await);
    // And from outside nobody gets in, even with a route.
    let subnet = stage.cli(&["network", "inspect", "-f", "{{(index .IPAM.Config 0).Subnet}}", &stage.config.instance]);
    assert!(subnet.contains('/'));
    let script = "ip netns exec \"$1\" busybox nc -w 2 \"$2\" 8080 </dev/null";
    let neighbour = targets.neighbour.split(':').next().unwrap();
    let reached = Command::new("sh").args(["-c", script, "sh", &beyond.name, neighbour]).status().unwrap();
    assert!(!reached.success());
    drop(stage);

    // What an administrator allows and blocks.
    let stage = Stage::new(&engine, |config| {
        config.docker.allowed_networks = vec![format!("{}/32", beyond.private).parse().unwrap()];
        config.docker.blocked_networks = vec![format!("{}/32", beyond.public).parse().unwrap()];
    })
    .await;
    let (targets, _service) = two_containers(&stage, &beyond).await;
    assert!(is_open(&stage, &targets.private).await);
    assert!(!is_open(&stage, &targets.public).await);
    assert!(!is_open(&stage, &targets.metadata).await);
    drop(stage);

    // No outside at all, and no names that carry something there.
    let stage = Stage::new(&engine, |config| {
        config.container.internet = false;
        config.docker.dns = vec![beyond.private.into()];
    })
    .await;
    let (targets, _service) = two_containers(&stage, &beyond).await;
    for target in targets.host.iter().chain([&targets.metadata, &targets.private, &targets.public, &targets.neighbour])
    {
        assert!(!is_open(&stage, target).await, "{target}");
    }
    let answer = stage.tell("w-1-1", "name 127.0.0.11:53").await;
    assert!(!answer.contains("203, 0, 113, 77"), "{answer}");
}

#[tokio::test]
async fn a_network_with_other_settings_is_made_anew_when_nobody_is_on_it() {
    let Some(engine) = stage::engine() else { return };
    let mut stage = Stage::new(&engine, |_| {}).await;
    let internal = |stage: &Stage| {
        stage.cli(&["network", "inspect", "-f", "{{.Internal}}", &stage.config.instance]).trim().to_owned()
    };
    assert_eq!(internal(&stage), "false");
    stage.start(&stage.spec("w-1-1").await).await;
    stage.config.container.internet = false;
    stage.connect_again().await;
    let error = stage.docker.start(&stage.spec("w-2-1").await, &stage::quiet).await.unwrap_err().to_string();
    assert!(error.contains("container.internet has changed"), "{error}");
    use mlad_gateway::runtime::Runtime as _;
    stage.docker.remove("w-1-1", std::time::Duration::ZERO).await.unwrap();
    stage.start(&stage.spec("w-2-1").await).await;
    assert_eq!(internal(&stage), "true");
}
