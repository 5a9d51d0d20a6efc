use super::*;
use std::collections::BTreeSet;

const REQUIRED: &str = "data_directory = '/var/lib/mlad'\nrun_directory = '/run/mlad'\n\
                        agent_binary = '/usr/lib/mlad/mlad'\ncatalog = '/etc/mlad/catalog.toml'\n";
const DEFAULT: &str = include_str!("../../../config/default.toml");

fn read(text: &str) -> Result<Config, ConfigError> {
    Config::parse(text, Path::new("/etc/mlad/gateway.toml"))
}

#[test]
fn a_program_that_is_not_there_is_named_with_file_key_and_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("gateway.toml");
    std::fs::write(&path, "data_directory = 'd'\nrun_directory = '/run/x'\nagent_binary = 'mlad'\ncatalog = 'c'\n")
        .unwrap();
    let message = Config::read(&path).unwrap_err().to_string();
    let missing = folder.path().join("mlad");
    assert!(message.contains("gateway.toml:3: agent_binary: "), "{message}");
    assert!(message.contains(&format!("{} is not there", missing.display())), "{message}");
    std::fs::write(&missing, "").unwrap();
    Config::read(&path).unwrap();
}

#[test]
fn the_default_file_says_what_holds_without_it() {
    assert_eq!(read(DEFAULT).unwrap(), read(REQUIRED).unwrap());
}

/// A line `#key = value` is a key that is absent by default; a line `# text` is text.
fn uncommented() -> String {
    DEFAULT.lines().map(|line| line.strip_prefix('#').filter(|rest| !rest.starts_with(' ')).unwrap_or(line)).fold(
        String::new(),
        |mut text, line| {
            text.push_str(line);
            text.push('\n');
            text
        },
    )
}

#[test]
fn what_the_default_file_comments_out_can_be_used() {
    toml::from_str::<Config>(&uncommented()).unwrap();
}

/// The keys a table takes, as the error about one it does not take says.
fn keys_of(section: Option<&str>) -> BTreeSet<String> {
    let text = match section {
        None => format!("{REQUIRED}no_such_key = 1\n"),
        Some(section) => format!("{REQUIRED}[{section}]\nno_such_key = 1\n"),
    };
    let error = toml::from_str::<Config>(&text).unwrap_err().to_string();
    let (_, expected) = error.split_once("expected").unwrap_or_else(|| panic!("{error}"));
    expected.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn the_default_file_misses_no_key_and_explains_each() {
    let whole: toml::Table = toml::from_str(&uncommented()).unwrap();
    let top = keys_of(None);
    assert_eq!(top, whole.keys().cloned().collect());
    for section in top.iter().filter(|key| whole[*key].is_table()) {
        let there: BTreeSet<String> = whole[section].as_table().unwrap().keys().cloned().collect();
        assert_eq!(keys_of(Some(section)), there, "[{section}]");
    }
    let mut before = "";
    for line in DEFAULT.lines() {
        if line.split_once(" = ").is_some() && !line.starts_with("# ") {
            assert!(before.starts_with("# "), "nothing explains {line}");
        }
        before = line;
    }
}

#[test]
fn what_is_wrong_is_named_with_file_key_and_line() {
    for (text, line, key) in [
        ("[ssh]\nmax_tries = 0\n", 6, "ssh.max_tries"),
        ("instance = 'A B'\n", 5, "instance"),
        ("\n[job]\ngrace_seconds = 1\n\ntime_limit_minutes = 99999999\n", 9, "job.time_limit_minutes"),
        ("[container]\nmemory_mib = 1000000\n", 6, "container.memory_mib"),
        ("[docker]\nbridge = 'much-too-long-a-name'\n", 6, "docker.bridge"),
        ("[allocator]\nurl = 'ftp://x'\n", 6, "allocator.url"),
        ("[allocator]\ntoken_file = 'x'\n", 6, "allocator.token_file"),
        ("[ssh]\nlisten = []\n", 6, "ssh.listen"),
        ("ssh = { max_channels = 0 }\n", 5, "ssh.max_channels"),
    ] {
        let message = read(&format!("{REQUIRED}{text}")).unwrap_err().to_string();
        assert!(message.contains(&format!("gateway.toml:{line}: {key}: ")), "{text}: {message}");
    }
    // The default of one contradicts the other.
    let message = read(&format!("{REQUIRED}[container]\nmax_memory_mib = 512\n")).unwrap_err().to_string();
    assert!(message.contains("gateway.toml: container.memory_mib: it is 16384"), "{message}");
    for (text, line, key) in [("[ssh]\nlisten = 7\n", 6, "listen"), ("[jop]\n", 5, "jop"), ("[job]\nx = 1\n", 6, "x")] {
        let message = read(&format!("{REQUIRED}{text}")).unwrap_err().to_string();
        assert!(message.contains(&format!("line {line}")) && message.contains(key), "{text}: {message}");
    }
    let long = format!("{}run_directory = '/{}'\n", REQUIRED.replace("run_directory", "#"), "x".repeat(100));
    assert!(read(&long).unwrap_err().to_string().contains("run_directory: "), "sockets must fit");
}

#[test]
fn relative_paths_lie_beside_the_file() {
    let text = "data_directory = 'data'\nrun_directory = '/run/x'\nagent_binary = '../mlad'\ncatalog = 'c.toml'\n\
                [files]\nworker_binary = 'worker'\n[allocator]\nnvml_library = 'nvml.so'\n";
    let config = read(text).unwrap();
    assert_eq!(config.data_directory, Path::new("/etc/mlad/data"));
    assert_eq!(config.agent_binary, Path::new("/etc/mlad/../mlad"));
    assert_eq!(config.run_directory, Path::new("/run/x"));
    assert_eq!(config.files.worker_binary, Some("/etc/mlad/worker".into()));
    assert_eq!(config.allocator.nvml_library, Some("/etc/mlad/nvml.so".into()));
}

#[test]
fn networks_are_read_strictly() {
    for good in ["0.0.0.0/0", "10.0.0.0/8", "192.168.1.7/32", "::/0", "fd00:1::/32", "fe80::1/128"] {
        assert_eq!(good.parse::<IpNetwork>().unwrap().to_string(), good);
    }
    for bad in ["", "10.0.0.0", "10.0.0.1/8", "10.0.0.0/33", "fd00::1/64", "host/8", "10.0.0.0/-1", "::/129"] {
        assert!(bad.parse::<IpNetwork>().is_err(), "{bad}");
    }
}

#[test]
fn a_network_has_its_addresses() {
    for (network, address, inside) in [
        ("10.0.0.0/8", "10.255.0.1", true),
        ("10.0.0.0/8", "11.0.0.0", false),
        ("192.168.1.7/32", "192.168.1.7", true),
        ("192.168.1.7/32", "192.168.1.6", false),
        ("0.0.0.0/0", "255.1.2.3", true),
        ("0.0.0.0/0", "::1", false),
        ("::/0", "2001:db8::1", true),
        ("::/0", "10.0.0.1", false),
        ("2001:db8::/56", "2001:db8:0:ff::1", true),
        ("2001:db8::/56", "2001:db8:0:100::1", false),
        ("fe80::1/128", "fe80::1", true),
    ] {
        let network: IpNetwork = network.parse().unwrap();
        assert_eq!(network.contains(address.parse().unwrap()), inside, "{network} {address}");
    }
}

#[test]
fn what_can_change_at_once_does_and_the_rest_is_named() {
    let running = read(&(REQUIRED.to_owned() + "[ssh]\nmax_tries = 3\n")).unwrap();
    assert_eq!(running.reloaded(running.clone()), (running.clone(), vec![]));
    let file = REQUIRED.replace("/run/mlad", "/run/other")
        + "[ssh]\nlisten = ['127.0.0.1:1']\nmax_tries = 7\nenrolment_tries_per_minute = 1\n[job]\nmax_per_user = 5\n";
    let (now, later) = running.reloaded(read(&file).unwrap());
    assert_eq!(now.ssh.max_tries, 7);
    assert_eq!(Config { ssh: Ssh { max_tries: 3, ..now.ssh.clone() }, ..now.clone() }, running);
    assert_eq!(later, ["run_directory", "ssh.listen", "ssh.enrolment_tries_per_minute", "job"]);
}

#[test]
fn a_cluster_needs_its_volumes() {
    let with = |lines: &str| {
        let text = format!(
            "data_directory = '/data'\nrun_directory = '/run/mlad'\ncatalog = '/c'\nagent_binary = '/m'\n\
             [container]\ngpu_binding = 'environment'\n[kubernetes]\nagent_image = 'agent:1'\n{lines}\n"
        );
        Config::parse(&text, Path::new("/etc/mlad/gateway.toml")).map_err(|error| error.to_string())
    };
    let config = with("volumes = [{ folder = '/data', claim = 'all' }]").unwrap();
    assert_eq!(config.kubernetes.unwrap().pod_security, PodSecurity::Restricted);
    for (lines, complaint) in [
        ("volumes = []", "none holds /data/home"),
        ("volumes = [{ folder = '/data/home', claim = 'home' }]", "none holds /data/datasets"),
        ("volumes = [{ folder = '/data' }]", "either `claim` or `host_path`"),
        ("volumes = [{ folder = '/data', claim = 'a', host_path = '/b' }]", "either `claim` or `host_path`"),
        ("volumes = [{ folder = '/data', claim = 'all' }]\nagent_port = 22", "1024"),
        ("volumes = [{ folder = '/data', claim = 'all' }]\nnamspace = 'a'", "namspace"),
    ] {
        let error = with(lines).unwrap_err();
        assert!(error.contains(complaint), "{lines}: {error}");
    }
}
