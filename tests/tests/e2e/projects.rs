//! Rows C5, C8, H1: a quota that is shared, several slices at once, and a job that gives way.

use mlad_tests::{Outcome, Person, Site, eventually};
use std::time::Duration;

const LONG: Duration = Duration::from_secs(120);

fn job(person: &Person, id: &str) -> serde_json::Value {
    let list = person.ssh("mlad ps --all --json").success().json();
    list["jobs"].as_array().unwrap().iter().find(|job| job["id"].as_i64() == id.parse().ok()).unwrap().clone()
}

#[test]
fn members_share_a_quota_and_nobody_else_learns_of_it() {
    let site = Site::start();
    let (alice, bob, carol) = (site.person("alice"), site.person("bob"), site.person("carol"));
    site.admin(&["project", "add", "vision"]).success();
    site.admin(&["project", "quota", "vision", "--slices", "2", "--gpu-memory", "80G"]).success();
    for member in ["alice", "bob"] {
        site.admin(&["project", "member", "add", "vision", member]).success();
    }
    // Two at once, seen both; and charged to the project.
    let run = "mlad run --project vision --slices 2 --gpu 1g.5gb -- sh -c 'echo $MLAD_PROJECT $MLAD_SLICES $NVIDIA_VISIBLE_DEVICES'";
    let text = alice.ssh(run).success().text();
    assert!(text.starts_with("vision 2 MIG-") && text.matches("MIG-").count() == 2, "{text}");

    site.admin(&["project", "quota", "vision", "--slices", "1"]).success();
    assert_eq!(alice.ssh(run).code, 4, "more than the project may hold");
    let first = alice.ssh("mlad submit --project vision --gpu 1g.5gb -- sleep 1000").success().text();
    eventually("the first runs", LONG, || job(&alice, &first)["state"] == "running");
    bob.ssh("mlad project default vision").success();
    let second = bob.ssh("mlad submit --gpu 1g.5gb -- true").success().text();
    eventually("the second waits for the quota", LONG, || job(&bob, &second)["reason"] == "Quota");
    let used = site.mlad_json(&["admin", "project", "show", "vision"])["used"]["slices"].clone();
    assert_eq!(used, 1);
    alice.ssh(&format!("mlad cancel {first}")).success();
    bob.ssh(&format!("mlad wait {second}")).success();

    assert_eq!(carol.ssh("mlad submit --project vision --gpu cpu -- true").code, 3);
    assert_eq!(carol.ssh("mlad project ls --json").success().json()["projects"].as_array().unwrap().len(), 0);
    assert_eq!(carol.ssh("mlad submit --priority 1 --gpu cpu -- true").code, 4);

    // A workspace counts for its project too, and is refused to others.
    let workspace = "echo $MLAD_PROJECT";
    let with = ["-o", "SetEnv=MLAD_PROJECT=vision"];
    assert_eq!(Outcome::of(&mut alice.ssh_command(&with, &[workspace])).success().text(), "vision");
    assert_eq!(Outcome::of(&mut carol.ssh_command(&with, &[workspace])).code, 3);
}

#[test]
fn what_is_reserved_is_there_for_those_it_is_for_and_for_nobody_else() {
    let machine = "driver_version = \"550.54.15\"\n[[gpu]]\nmodel = \"A100-40GB\"\ncount = 1\nmig = true\n";
    let site = Site::builder().machine(machine).start();
    let (alice, bob) = (site.person("alice"), site.person("bob"));
    let add = ["reserve", "add", "course", "--for", "2h", "--gpu", "3g.20gb", "--slices", "2", "--user", "alice"];
    site.admin(&add).success();
    let mut other = add;
    other[2] = "other";
    let refused = site.admin(&other);
    assert!(refused.code != 0 && refused.stderr.contains("course"), "{}", refused.stderr);
    let listed = site.mlad_json(&["admin", "reserve", "ls"]);
    assert_eq!(
        (&listed["reservations"][0]["name"], &listed["reservations"][0]["active"]),
        (&"course".into(), &true.into())
    );

    // Space is free, and not for bob; alice has it.
    let waits = bob.ssh("mlad submit --gpu 1g.5gb -- true").success().text();
    eventually("bob's job waits for the reservation", LONG, || job(&bob, &waits)["reason"] == "Reserved");
    let why = bob.ssh(&format!("mlad why {waits}")).success().text();
    assert!(why.contains("set aside") && why.contains("ahead of it: nobody"), "{why}");
    assert_ne!(bob.ssh("mlad submit --reservation course --gpu 1g.5gb -- true").code, 0);
    assert_eq!(bob.ssh("mlad reservations --json").success().json()["reservations"].as_array().unwrap().len(), 0);
    assert!(alice.ssh("mlad reservations").success().text().contains("course"));
    let text = alice.ssh("mlad run --reservation course --gpu 2g.10gb -- echo within").success().text();
    assert_eq!(text, "within");

    site.admin(&["reserve", "rm", "course"]).success();
    bob.ssh(&format!("mlad wait {waits}")).success();
    assert_ne!(alice.ssh("mlad submit --reservation course --gpu 1g.5gb -- true").code, 0);
}

#[test]
fn a_preemptible_job_gives_way_and_finishes_later() {
    let machine = "driver_version = \"550.54.15\"\n[[gpu]]\nmodel = \"A100-40GB\"\ncount = 1\nmig = true\n";
    let site = Site::builder().machine(machine).setting("allocator", "notice_seconds = 5").start();
    let (alice, bob) = (site.person("alice"), site.person("bob"));
    site.admin(&["user", "quota", "bob", "--priority", "10"]).success();
    let script =
        "test $MLAD_JOB_ATTEMPT = 2 && exit 0; trap \"echo told >> told; exit 9\" TERM; while true; do sleep 0.1; done";
    let submit = format!("mlad submit --preemptible --gpu 7g.40gb -- sh -c '{script}'");
    let id = alice.ssh(&submit).success().text();
    eventually("it runs", LONG, || job(&alice, &id)["state"] == "running");
    let urgent = bob.ssh("mlad run --priority 10 --gpu 7g.40gb -- echo urgent").success();
    assert_eq!(urgent.text(), "urgent");
    alice.ssh(&format!("mlad wait {id}")).success();
    assert_eq!(alice.ssh("cat told").success().text(), "told");
    let attempts = job(&alice, &id)["attempts"].clone();
    assert_eq!((attempts.as_array().unwrap().len(), &attempts[0]["preempted"]), (2, &true.into()));
}

#[test]
fn who_held_what_and_what_was_used_is_told_afterwards() {
    let site = Site::start();
    let (alice, bob) = (site.person("alice"), site.person("bob"));
    site.admin(&["project", "add", "vision"]).success();
    site.admin(&["project", "member", "add", "vision", "alice"]).success();
    let id = alice.ssh("mlad submit --project vision --gpu 2g.10gb -- sleep 1000").success().text();
    eventually("it runs", LONG, || job(&alice, &id)["state"] == "running");
    let during = site.mlad_json(&["who"])["leases"][0]["granted_at"].as_str().unwrap().to_owned();
    eventually("something is used", LONG, || {
        let used = alice.ssh("mlad acct --json").success().json();
        used["usage"][0]["slice_seconds"].as_u64().unwrap_or(0) > 0
    });
    alice.ssh(&format!("mlad cancel {id}")).success();
    eventually("its slice is free", LONG, || site.mlad_json(&["who"])["leases"].as_array().unwrap().is_empty());

    let held = |person: &Person| person.ssh(&format!("mlad who --at {during} --json")).success().json();
    let hers = held(&alice);
    assert_eq!(hers["leases"][0]["workload"], format!("j-{id}-1"), "{hers}");
    assert_eq!(hers["leases"][0]["project"], "vision");
    assert!(hers["leases"][0]["slices"][0]["uuid"].as_str().unwrap().starts_with("MIG-"));
    let his = held(&bob);
    assert_eq!(his["leases"][0]["user"], "alice");
    assert_eq!((&his["leases"][0]["workload"], his["leases"][0].get("project")), (&"job".into(), None), "{his}");
    assert!(alice.ssh(&format!("mlad who --at {during}")).success().text().contains("2g.10gb"));
    assert_eq!(alice.ssh("mlad who --at 2999-01-01").code, 2);

    // By project, for the member and the administrator; nothing of it for others.
    let csv = alice.ssh("mlad acct --by project --csv").success().text();
    assert!(csv.starts_with("day,user,project,") && csv.contains("\n,,vision,"), "{csv}");
    assert!(site.mlad(&["acct", "--by", "user,day"]).success().text().contains("alice"));
    assert_eq!(bob.ssh("mlad acct --json").success().json()["usage"].as_array().unwrap().len(), 0);
}
