//! What no option of OpenSSH's client can ask for, by libraries: see `probe.py`.

use super::SOON;
use mlad_tests::{Outcome, Person, Site};
use std::{collections::BTreeMap, path::Path, process::Command};

/// Runs the probe; each case with what came of it.
fn probe(person: &Person) -> BTreeMap<String, String> {
    let python =
        std::env::var_os("MLAD_TEST_PYTHON").expect("MLAD_TEST_PYTHON is not set: run this by scripts/test e2e");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/e2e/oracle/probe.py");
    let mut command = Command::new(python);
    command.arg(script).args(person.address()).arg(person.path("id_ed25519"));
    let outcome = Outcome::within(4 * SOON, &mut command).success();
    let json = outcome.json();
    json.as_object().unwrap().iter().map(|(case, seen)| (case.clone(), seen.to_string())).collect()
}

#[test]
fn a_command_beyond_the_limit_is_refused_and_nothing_else_is_harmed() {
    let site = Site::start();
    let seen = probe(&site.person("alice"));
    assert_eq!(seen["220 kB"], "\"SSHException: Channel closed.\"", "{seen:?}");
    let fine = "[0,\"still here\\n\",11,\"\"]";
    assert_eq!((seen["after it"].as_str(), seen["another connection"].as_str()), (fine, fine), "{seen:?}");
    assert!(!seen["1 MB"].starts_with('['), "{seen:?}");
}
