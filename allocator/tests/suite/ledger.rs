//! `mlad-allocator check`: on the database of a program that runs, and of one that went wrong.

use crate::{disk::sql, get, host::Host, machine::Machine};
use std::process::Command;

fn check(machine: &Machine, arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mlad-allocator"));
    let output = command.arg("check").arg("--database").arg(machine.database()).args(arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ledger_in_use_is_checked_beside_its_allocator() {
    let machine = Machine::new("A100-40GB", 1);
    let running = Host::Unix.start(&machine).await;
    let held = get(running.allocator(), "w-1-1", "3g.20gb").await;
    get(running.allocator(), "w-2-1", "2g.10gb").await;
    running.allocator().release("w-2-1").await.unwrap();
    let (code, out, error) = check(&machine, &[]);
    assert_eq!(code, Some(0), "{out}{error}");
    assert_eq!(out, "2 requests, 2 leases, 1 of them held: the ledger is sound\n");

    // The lease that is over holds the other's columns, as if it had never been released.
    sql(&machine, "UPDATE slice SET slice_start = 0, slice_size = 8 WHERE fence = 2; UPDATE lease SET released_at = NULL WHERE fence = 2;".to_owned()).await;
    let (code, out, _) = check(&machine, &["--json"]);
    assert_eq!(code, Some(1));
    let told: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((told["sound"].as_bool(), told["held"].as_u64()), (Some(false), Some(2)));
    let rules: Vec<&str> = told["findings"].as_array().unwrap().iter().filter_map(|f| f["rule"].as_str()).collect();
    assert_eq!(rules, ["one-holder", "held", "held"], "{out}");
    assert!(out.contains("w-2-1") && out.contains(&held.slices[0].gpu), "{out}");
    let (code, out, _) = check(&machine, &[]);
    assert!(code == Some(1) && out.contains("one-holder: ") && out.contains("NOT sound"), "{out}");
    drop(running);
}

#[test]
fn what_is_no_ledger_is_told() {
    let machine = Machine::new("A100-40GB", 1);
    let (code, _, error) = check(&machine, &[]);
    assert!(code == Some(1) && error.contains("allocator.db"), "{error}");
    std::fs::write(machine.database(), "").unwrap();
    let (code, _, error) = check(&machine, &[]);
    assert!(code == Some(1) && error.contains("not the database of an allocator"), "{error}");
}
