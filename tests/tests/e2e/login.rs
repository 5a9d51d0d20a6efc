//! Rows A1, A3, A6: a login gives a container with a slice of one's own, and it behaves as a login should.

use mlad_tests::{Outcome, Site};

#[test]
fn a_command_runs_in_a_container_that_sees_one_slice() {
    let site = Site::start();
    let alice = site.person("alice");
    let devices = alice.ssh("echo $NVIDIA_VISIBLE_DEVICES").success().text();
    assert!(devices.starts_with("MIG-") && !devices.contains(','), "{devices}");
    assert_eq!(alice.ssh("id -un; pwd").success().text(), "alice\n/home/alice");
    assert_eq!(site.containers().len(), 1, "both commands shared one container");
    let who = site.mlad_json(&["who"]);
    assert_eq!(who["leases"][0]["uuids"][0], devices.as_str());
    assert_eq!(who["leases"][0]["user"], "alice");
}

#[test]
fn exit_codes_and_signals_come_back() {
    let site = Site::start();
    let alice = site.person("alice");
    for code in [0, 1, 7, 127, 255] {
        alice.ssh(&format!("exit {code}")).exits(code);
    }
    // OpenSSH's client ends with 255 then, as for a connection that breaks; what it was told tells them apart.
    let killed = Outcome::of(&mut alice.ssh_command(&["-v"], &["kill -TERM $$"])).exits(255);
    assert!(killed.stderr.contains("rtype exit-signal"), "{}", killed.stderr);
    assert!(!killed.stderr.contains("rtype exit-status"), "{}", killed.stderr);
    let streams = alice.ssh("echo out; echo err >&2").success();
    assert_eq!((streams.text().as_str(), streams.stderr.as_str()), ("out", "err\n"));
}
