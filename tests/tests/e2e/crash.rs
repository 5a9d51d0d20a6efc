//! Row E2, C2: nothing that was promised is lost when the gateway is killed. Case 6 of the first issue.

use mlad_tests::{Person, Site, eventually};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    time::Duration,
};

const LONG: Duration = Duration::from_secs(300);

#[test]
fn a_killed_gateway_loses_nothing_and_runs_nothing_twice() {
    // Ten sessions; the quota lets five jobs run, and fifty more wait.
    let mut site = Site::builder().setting("workspace", "default_need = \"cpu\"").start();
    let people: Vec<Person> = (1..=10).map(|n| site.person(&format!("user{n}"))).collect();
    let hosts: Vec<String> =
        people.iter().map(|person| person.ssh("hostname; touch /tmp/kept").success().text()).collect();
    let sessions: Vec<_> = people.iter().map(|person| person.start(&[], &["cat"])).collect();

    site.admin(&["user", "quota", "user1", "--slices", "5"]).success();
    let alice = &people[0];
    // Each run of a job leaves one line; a job that ran twice would leave two.
    let command = "sh -c 'echo $MLAD_JOB_ID $MLAD_JOB_ATTEMPT >> runs; while [ ! -e go ]; do sleep 0.2; done'";
    for _ in 0..5 {
        alice.ssh(&format!("mlad submit --gpu 1g.5gb -- {command}")).success();
    }
    let runs = site.data("home/user1/runs");
    let count = || fs::read_to_string(&runs).unwrap_or_default().lines().count();
    eventually("five jobs run", LONG, || count() == 5);
    for _ in 0..50 {
        alice.ssh(&format!("mlad submit --gpu 1g.5gb -- {command}")).success();
    }

    let before = site.containers();
    site.kill_gateway();
    drop(sessions);
    assert_eq!(site.containers(), before, "what ran runs on");
    site.start_gateway();

    let jobs = site.mlad_json(&["ps", "--user", "*", "--all", "--limit", "100"]);
    assert_eq!(jobs["jobs"].as_array().unwrap().len(), 55, "every accepted job is there");
    eventually("the five are still running", LONG, || states(&site).get("running") == Some(&5));
    assert_eq!(count(), 5, "none was started again");
    for (person, host) in people.iter().zip(&hosts) {
        assert_eq!(&person.ssh("ls /tmp/kept >&2; hostname").success().text(), host, "the same workspace as before");
    }
    no_slice_has_two_holders(&site);
    assert_eq!(site.visible_slices().len(), 5, "each of the five sees a slice");

    fs::write(site.data("home/user1/go"), "").unwrap();
    eventually("all jobs have succeeded", LONG, || {
        no_slice_has_two_holders(&site);
        states(&site).get("succeeded") == Some(&55)
    });
    let lines = fs::read_to_string(&runs).unwrap();
    let ran: BTreeSet<&str> = lines.lines().filter_map(|line| line.split(' ').next()).collect();
    assert_eq!((lines.lines().count(), ran.len()), (55, 55), "each ran once");
    eventually("no container of a job is left", LONG, || site.containers().iter().all(|name| name.starts_with("w-")));
    assert!(site.containers().len() <= 10);
    let run = site.path("run/workloads");
    let left = fs::read_dir(run)
        .unwrap()
        .filter_map(Result::ok)
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("j-"));
    assert_eq!(left.count(), 0, "no folder of a job is left");
}

fn states(site: &Site) -> BTreeMap<String, usize> {
    let jobs = site.mlad_json(&["ps", "--user", "*", "--all", "--limit", "100"]);
    jobs["jobs"].as_array().unwrap().iter().fold(BTreeMap::new(), |mut states, job| {
        *states.entry(job["state"].as_str().unwrap().to_owned()).or_default() += 1;
        states
    })
}

/// Neither by the ledger nor by what the containers see.
fn no_slice_has_two_holders(site: &Site) {
    let who = site.mlad_json(&["who"]);
    let mut seen = BTreeSet::new();
    for lease in who["leases"].as_array().unwrap() {
        for uuid in lease["uuids"].as_array().unwrap() {
            assert!(seen.insert(uuid.as_str().unwrap().to_owned()), "{uuid} is held twice: {who}");
        }
    }
    let mut holders = BTreeMap::new();
    for (workload, uuid) in site.visible_slices() {
        let other = holders.insert(uuid.clone(), workload.clone());
        assert_eq!(other, None, "{workload} sees {uuid} as well");
    }
}

#[test]
fn a_gateway_killed_again_and_again_while_jobs_come_in_loses_none() {
    let mut site = Site::builder().setting("workspace", "default_need = \"cpu\"").start();
    let alice = site.person("alice");
    let mut accepted = 0;
    for round in 0..4 {
        for number in 0..5 {
            let outcome = alice.ssh(&format!(
                "mlad submit --key {round}-{number} --gpu 1g.5gb -- sh -c 'echo {round}-{number} >> runs'"
            ));
            accepted += u32::from(outcome.code == 0);
        }
        site.kill_gateway();
        site.start_gateway();
    }
    assert_eq!(accepted, 20);
    eventually("all have succeeded", LONG, || states(&site).get("succeeded") == Some(&20));
    let lines = fs::read_to_string(site.data("home/alice/runs")).unwrap();
    let runs: BTreeSet<&str> = lines.lines().collect();
    assert_eq!(runs.len(), 20);
    assert_eq!(lines.lines().count(), 20, "none ran twice:\n{lines}");
    eventually("nothing is left", LONG, || site.containers().iter().all(|name| !name.starts_with("j-")));
}

#[test]
fn a_stopped_gateway_leaves_workloads_running() {
    let mut site = Site::builder().setting("workspace", "default_need = \"cpu\"").start();
    let alice = site.person("alice");
    let host = alice.ssh("hostname").success().text();
    let id =
        alice.ssh("mlad submit --gpu cpu -- sh -c 'while [ ! -e go ]; do sleep 0.2; done; echo done'").success().text();
    eventually("it runs", LONG, || states(&site).get("running") == Some(&1));
    site.stop_gateway();
    fs::write(site.data("home/alice/go"), "").unwrap();
    site.start_gateway();
    alice.ssh(&format!("mlad wait {id}")).success();
    assert_eq!(alice.ssh(&format!("mlad logs {id}")).success().text(), "done");
    assert_eq!(alice.ssh("hostname").success().text(), host);
}
