//! What a container reaches: the outside, and nothing else.
//!
//! There is no outside here, and the tests' machine is to stay as it is, so both are made: a network namespace
//! that is the host, with an engine of its own, and one beyond it, with a public address, a private one, and the
//! address of a cloud's metadata service. Docker's own rules are told to accept everything, and the same
//! questions are asked without the firewall first: an answer "closed" is known to be its doing.

use super::engine::Engine;
use crate::stage::{self, Stage, run};
use mlad_gateway::config::{Config, Firewall};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::{
    collections::BTreeMap,
    fs::File,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsFd as _,
    path::Path,
    process::Command,
    thread,
    time::Duration,
};

/// The host, and the machine beyond it.
const HOST: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const PUBLIC: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
const PRIVATE: Ipv4Addr = Ipv4Addr::new(10, 213, 0, 7);
const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// Where a neighbour listens.
const SERVICE: u16 = 8080;

/// Two network namespaces.
struct World {
    host: String,
    beyond: String,
}

impl World {
    fn new() -> Self {
        let id = std::process::id();
        let world = Self { host: format!("mlad-h{id}"), beyond: format!("mlad-b{id}") };
        let script = format!(
            "ip netns add {host}; ip netns add {beyond}; ip -n {host} link set lo up; ip -n {beyond} link set lo up; \
             ip -n {host} link add up0 type veth peer name eth0 netns {beyond}; \
             ip -n {host} addr add {HOST}/30 dev up0; ip -n {host} link set up0 up; \
             ip -n {beyond} addr add {PUBLIC}/30 dev eth0; ip -n {beyond} addr add {PRIVATE}/32 dev eth0; \
             ip -n {beyond} addr add {METADATA}/32 dev eth0; ip -n {beyond} link set eth0 up; \
             ip -n {beyond} route add default via {HOST}; \
             ip -n {host} route add {PRIVATE}/32 via {PUBLIC}; ip -n {host} route add {METADATA}/32 via {PUBLIC}",
            host = world.host,
            beyond = world.beyond,
        );
        run(Command::new("sh").args(["-ec", &script]));
        // An address of a link is there at once, not after a search for others that have it.
        let no_search = "for name in all default; do echo 0 > /proc/sys/net/ipv6/conf/$name/accept_dad; done";
        within(&world.host, || run(Command::new("sh").args(["-ec", no_search])));
        within(&world.beyond, || {
            for address in [PUBLIC, PRIVATE, METADATA] {
                serve_tcp(TcpListener::bind((address, 80)).unwrap());
                for port in [53, 5300] {
                    serve_udp(UdpSocket::bind((address, port)).unwrap());
                }
            }
        });
        world
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for name in [&self.host, &self.beyond] {
            let _ = Command::new("ip").args(["netns", "del", name]).status();
        }
    }
}

/// Does something in a network namespace; what it starts stays there.
fn within<T: Send>(namespace: &str, work: impl FnOnce() -> T + Send) -> T {
    let namespace = File::open(format!("/run/netns/{namespace}")).unwrap();
    let work = move || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        work()
    };
    thread::scope(|scope| scope.spawn(work).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn serve_tcp(listener: TcpListener) {
    thread::spawn(move || listener.incoming().for_each(drop));
}

/// A name server that knows one address; whatever else it is asked it says back.
fn serve_udp(socket: UdpSocket) {
    thread::spawn(move || {
        let mut question = [0; 512];
        while let Ok((count, from)) = socket.recv_from(&mut question) {
            let _ = socket.send_to(&answer(&question[..count]), from);
        }
    });
}

fn answer(question: &[u8]) -> Vec<u8> {
    let Some(end) = question.iter().skip(12).position(|byte| *byte == 0) else { return question.to_vec() };
    let mut answer = question[..12 + end + 5].to_vec();
    answer[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
    answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 203, 0, 113, 77]);
    answer
}

/// An instance with two containers: `w-1-1` asks, `w-2-1` listens.
struct Scene {
    stage: Stage,
    neighbour: String,
    /// What the container may try: orders to it, by what they are after.
    orders: BTreeMap<&'static str, Vec<String>>,
}

impl Scene {
    async fn new(engine: &Path, change: impl FnOnce(&mut Config)) -> Self {
        let stage = Stage::new(engine, change).await;
        for name in ["w-1-1", "w-2-1"] {
            stage.start(&stage.spec(name).await).await;
        }
        assert_eq!(stage.tell("w-2-1", &format!("serve {SERVICE}")).await, "done");
        assert_eq!(stage.tell("w-2-1", &format!("tcp 127.0.0.1:{SERVICE}")).await, "open");
        let address = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}";
        let neighbour = stage.cli(&["inspect", "-f", address, &stage.container("w-2-1")]).trim().to_owned();
        let of_network =
            |format: &str| stage.cli(&["network", "inspect", "-f", format, &stage.config.instance]).trim().to_owned();
        let gateway: IpAddr = of_network("{{(index .IPAM.Config 0).Gateway}}").parse().unwrap();
        let bridge = of_network("{{index .Options \"com.docker.network.bridge.name\"}}");

        let mut host = Vec::new();
        let own = addresses("ip -4 -o addr show scope global");
        assert!(own.contains(&gateway) && own.contains(&HOST.into()), "{own:?}");
        for address in own {
            host.push(format!("tcp {}", listen(SocketAddr::new(address, 0))));
            let socket = UdpSocket::bind((address, 0)).unwrap();
            host.push(format!("udp {}", socket.local_addr().unwrap()));
            serve_udp(socket);
        }
        let mut orders = BTreeMap::from([
            ("host", host),
            ("neighbour", vec![format!("tcp {neighbour}:{SERVICE}")]),
            ("metadata", vec![format!("tcp {METADATA}:80"), format!("udp {METADATA}:53")]),
            ("private", vec![format!("tcp {PRIVATE}:80"), format!("udp {PRIVATE}:5300")]),
            ("names", vec![format!("udp {PRIVATE}:53")]),
            ("public", vec![format!("tcp {PUBLIC}:80"), format!("udp {PUBLIC}:5300")]),
        ]);
        if Path::new("/proc/sys/net/ipv6").exists() {
            orders.insert("link", of_the_link(&stage, &bridge).await);
        } else {
            eprintln!("this kernel has no IPv6: its addresses of the link are not tried");
        }
        Self { stage, neighbour, orders }
    }

    /// Gives every order; says which were answered, by what they are after.
    async fn ask(&self) -> Vec<(&'static str, &str, bool)> {
        let orders = self.orders.iter().flat_map(|(of, orders)| orders.iter().map(|order| (*of, order.as_str())));
        let answers = orders.map(|(of, order)| async move {
            let answer = self.stage.tell("w-1-1", order).await;
            assert!(answer.starts_with("open") || answer.starts_with("closed"), "{order}: {answer}");
            (of, order, answer.starts_with("open"))
        });
        futures::future::join_all(answers).await
    }

    /// Only these are open, and all that there is of them.
    async fn open_are(&self, wanted: &[&str]) {
        for (of, order, is_open) in self.ask().await {
            assert_eq!(is_open, wanted.contains(&of), "{of}: {order}");
        }
    }

    /// Whether a name is resolved, by the resolver of the container.
    async fn knows_names(&self) -> bool {
        self.stage.tell("w-1-1", "name 127.0.0.11:53").await.contains("203, 0, 113, 77")
    }

    /// Whether the machine beyond gets at the neighbour, to which it has a route.
    fn is_reached_from(&self, beyond: &str) -> bool {
        let neighbour = SocketAddr::new(self.neighbour.parse().unwrap(), SERVICE);
        within(beyond, || TcpStream::connect_timeout(&neighbour, Duration::from_secs(3)).is_ok())
    }
}

/// Orders to reach the bridge and the neighbour at their IPv6 addresses of the link. The network has no IPv6, so
/// the containers are given it from outside: no setting of the engine is to stand between them.
async fn of_the_link(stage: &Stage, bridge: &str) -> Vec<String> {
    let in_container = |name: &str, script: &str| {
        let process = stage.cli(&["inspect", "-f", "{{.State.Pid}}", &stage.container(name)]);
        run(Command::new("nsenter").args(["-t", process.trim(), "-n", "sh", "-ec", script]))
    };
    let enable = |device: &str| {
        format!(
            "cd /proc/sys/net/ipv6/conf/{device}; echo 0 > accept_dad; echo 1 > disable_ipv6; echo 0 > disable_ipv6"
        )
    };
    for name in ["w-1-1", "w-2-1"] {
        in_container(name, &enable("eth0"));
    }
    run(Command::new("sh").args(["-ec", &enable(bridge)]));
    let index = stage.tell("w-1-1", "read /sys/class/net/eth0/ifindex").await;
    let index = index.trim_end_matches('|');
    let of_bridge = addresses(&format!("ip -6 -o addr show dev {bridge} scope link"));
    let of_neighbour = parse_addresses(&in_container("w-2-1", "ip -6 -o addr show dev eth0 scope link"));
    assert!(!of_bridge.is_empty() && !of_neighbour.is_empty(), "{of_bridge:?} {of_neighbour:?}");
    let port = listen("[::]:0".parse().unwrap()).port();
    let of_bridge = of_bridge.into_iter().map(|address| format!("tcp [{address}%{index}]:{port}"));
    let of_neighbour = of_neighbour.into_iter().map(|address| format!("tcp [{address}%{index}]:{SERVICE}"));
    of_bridge.chain(of_neighbour).collect()
}

fn listen(at: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind(at).unwrap();
    let address = listener.local_addr().unwrap();
    serve_tcp(listener);
    address
}

fn addresses(command: &str) -> Vec<IpAddr> {
    parse_addresses(&run(Command::new("sh").args(["-ec", command])))
}

fn parse_addresses(text: &str) -> Vec<IpAddr> {
    let of_line = |line: &str| {
        let mut words = line.split_whitespace().skip_while(|word| !word.starts_with("inet"));
        words.nth(1)?.split('/').next()?.parse().ok()
    };
    text.lines().filter_map(of_line).collect()
}

fn tables(instance: &str) -> Vec<String> {
    let listed = run(Command::new("nft").args(["list", "tables"]));
    listed.lines().filter(|line| line.ends_with(&format!(" mlad_{instance}"))).map(str::to_owned).collect()
}

#[test]
fn a_container_reaches_the_outside_and_nothing_else() {
    if stage::engine().is_none() {
        return;
    }
    let world = World::new();
    let mut engine = Engine::new(&["nsenter", &format!("--net=/run/netns/{}", world.host)]);
    engine.start();
    within(&world.host, || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            engine.answers().await;
            reaches_the_outside_and_nothing_else(&engine.socket(), &world).await;
        });
    });
}

async fn reaches_the_outside_and_nothing_else(engine: &Path, world: &World) {
    run(Command::new("iptables").args(["-I", "DOCKER-USER", "-j", "ACCEPT"]));

    // Without: the way to each target exists.
    let scene = Scene::new(engine, |config| config.docker.firewall = Firewall::None).await;
    scene.open_are(&["host", "neighbour", "metadata", "private", "names", "public", "link"]).await;
    assert!(scene.is_reached_from(&world.beyond));
    drop(scene);

    // With. The name server has a private address: its port for names is open, and no other.
    let scene = Scene::new(engine, |config| config.docker.dns = vec![PRIVATE.into()]).await;
    scene.open_are(&["names", "public"]).await;
    assert!(scene.knows_names().await);
    assert!(!scene.is_reached_from(&world.beyond));
    // Somebody flushes the rules, all or some: the next start puts them back.
    let instance = scene.stage.config.instance.clone();
    let stood = tables(&instance);
    assert!(stood.iter().any(|table| table.starts_with("table inet ")), "{stood:?}");
    for (number, table) in stood.iter().enumerate() {
        let words: Vec<_> = table.split_whitespace().collect();
        run(Command::new("nft").arg("delete").args(&words));
        if table.starts_with("table inet ") {
            assert!(scene.ask().await.iter().any(|(of, _, is_open)| *of == "host" && *is_open));
        }
        scene.stage.start(&scene.stage.spec(&format!("w-{}-1", 3 + number)).await).await;
        assert_eq!(tables(&instance), stood);
    }
    scene.open_are(&["names", "public"]).await;
    drop(scene);

    // What an administrator allows and blocks. Neighbours stay apart, and so does the host, whatever is allowed.
    let scene = Scene::new(engine, |config| {
        let allowed = [format!("{PRIVATE}/32"), "172.16.0.0/12".into(), "192.168.0.0/16".into(), "fe80::/10".into()];
        config.docker.allowed_networks = allowed.map(|network| network.parse().unwrap()).to_vec();
        config.docker.blocked_networks = vec![format!("{PUBLIC}/32").parse().unwrap()];
    })
    .await;
    scene.open_are(&["private", "names"]).await;
    drop(scene);

    // No outside at all, and no names that carry something there.
    let scene = Scene::new(engine, |config| {
        config.container.internet = false;
        config.docker.dns = vec![PRIVATE.into()];
    })
    .await;
    scene.open_are(&[]).await;
    assert!(!scene.knows_names().await);
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
