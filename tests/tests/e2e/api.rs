//! Rows L1, L3: the HTTP API in the container and on TCP, with `curl`.

use mlad_tests::{Outcome, Site};
use std::{fs, process::Command};

#[test]
fn the_socket_in_the_container_knows_who_calls() {
    let site = Site::start();
    let alice = site.person("alice");
    let curl =
        |path: &str| alice.ssh(&format!("curl -s --unix-socket /run/mlad/api.sock http://mlad{path}")).success().json();
    let identity = curl("/v1/whoami");
    assert_eq!((identity["user"].as_str(), identity["role"].as_str()), (Some("alice"), Some("user")));
    assert!(identity["workload"].as_str().unwrap().starts_with("w-"));
    assert!(curl("/v1/jobs")["jobs"].as_array().unwrap().is_empty());
    let refused = curl("/v1/admin/users");
    assert_eq!(refused["code"], "denied");
    assert!(refused["message"].is_string());
    let openapi = curl("/v1/openapi.json");
    assert!(openapi["openapi"].as_str().unwrap().starts_with("3.1"));
    assert!(openapi["paths"]["/v1/jobs"]["post"].is_object());
}

#[test]
fn the_tcp_port_takes_bearer_tokens() {
    let site = Site::start();
    let alice = site.person("alice");
    let secret = alice.ssh("mlad token add laptop").success().text();
    let file = alice.path("token");
    fs::write(&file, format!("header = \"Authorization: Bearer {secret}\"\n")).unwrap();
    let url = format!("http://127.0.0.1:{}/v1/whoami", site.api_port());
    let status = |arguments: &[&str]| {
        Outcome::of(
            Command::new("curl").args(["-s", "-o", "/dev/null", "-w", "%{http_code}"]).args(arguments).arg(&url),
        )
        .text()
    };
    assert_eq!(status(&["-K", file.to_str().unwrap()]), "200");
    assert_eq!(status(&[]), "401");
    assert_eq!(status(&["-H", "Authorization: Bearer wrong"]), "401");
    let id = alice.ssh("mlad token ls --json").success().json()[0]["id"].as_i64().unwrap();
    alice.ssh(&format!("mlad token rm {id}")).success();
    assert_eq!(status(&["-K", file.to_str().unwrap()]), "401");
    // The log that is not yet merged (`gateway.db-wal`) is as good as the database.
    let mut searched = 0;
    for entry in fs::read_dir(site.data("")).unwrap().map(Result::unwrap) {
        if entry.file_name().to_string_lossy().starts_with("gateway.db") {
            let bytes = fs::read(entry.path()).unwrap();
            let found = bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
            assert!(!found, "the secret is in {}", entry.path().display());
            searched += bytes.len();
        }
    }
    assert!(searched > 0, "there is a database");
}
