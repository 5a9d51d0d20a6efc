//! Rows C2–C4, C7: slices among many people. Cases 2 and 3 of the first issue.

use mlad_tests::{Lines, Outcome, Person, RunningClient, Site, eventually, eventually_some};
use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader},
    sync::mpsc,
    thread,
    time::Duration,
};

/// Longest time until forty containers are made on two cores.
const LONG: Duration = Duration::from_secs(240);

#[test]
fn forty_people_ask_for_twenty_four_slices() {
    let site = Site::builder().setting("workspace", "default_need = \"2g.10gb\"").start();
    let people: Vec<Person> = (1..=40).map(|n| site.person(&format!("user{n:02}"))).collect();
    let (send, inside) = mpsc::channel();
    let mut clients: Vec<Option<RunningClient>> = people.iter().map(|person| Some(log_in(person))).collect();
    for (number, client) in clients.iter_mut().enumerate() {
        let send = send.clone();
        let out = client.as_mut().unwrap().child.stdout.take().unwrap();
        thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                drop(send.send((number, line)));
            }
        });
    }

    // Who is in, and with which slice.
    let mut held = BTreeMap::new();
    let enter = |held: &mut BTreeMap<usize, String>| {
        let (number, uuid) = inside.recv_timeout(LONG).expect("the next gets in");
        assert!(uuid.starts_with("MIG-") && !uuid.contains(','), "one slice: {uuid}");
        assert!(!held.values().any(|other| *other == uuid), "two people see {uuid}");
        assert_eq!(held.insert(number, uuid), None);
    };
    for _ in 0..24 {
        enter(&mut held);
    }
    eventually("16 wait, each with a place of their own", LONG, || places(&site) == (1..=16).collect::<Vec<u64>>());
    assert!(inside.try_recv().is_err(), "nobody else is in");

    // One leaves: somebody gets in, and everybody behind moves up by one.
    let mut leave = |held: &mut BTreeMap<usize, String>, number: usize| {
        clients[number] = None;
        held.remove(&number).expect("whoever leaves was in");
        site.mlad(&["admin", "stop", &workload_of(&site, &format!("user{:02}", number + 1))]).success();
    };
    let first: Vec<usize> = held.keys().copied().collect();
    leave(&mut held, first[0]);
    enter(&mut held);
    assert!(!held.contains_key(&first[0]), "one of those who waited");
    eventually("15 wait", LONG, || places(&site) == (1..=15).collect::<Vec<u64>>());

    // The rest of those who were in leave: all who waited get in.
    for number in &first[1..] {
        leave(&mut held, *number);
    }
    while held.len() < 16 {
        enter(&mut held);
    }
    eventually("nobody waits", LONG, || places(&site).is_empty());
}

/// Prints the slice, then stays until its standard input ends.
fn log_in(person: &Person) -> RunningClient {
    person.start(&[], &["echo $NVIDIA_VISIBLE_DEVICES; cat"])
}

fn places(site: &Site) -> Vec<u64> {
    let who = site.mlad_json(&["who"]);
    who["waits"].as_array().unwrap().iter().map(|wait| wait["place"].as_u64().unwrap()).collect()
}

fn workload_of(site: &Site, user: &str) -> String {
    let who = site.mlad_json(&["who"]);
    let leases = who["leases"].as_array().unwrap();
    let lease =
        leases.iter().find(|lease| lease["user"] == user).unwrap_or_else(|| panic!("{user} holds nothing: {who}"));
    lease["workload"].as_str().unwrap().into()
}

#[test]
fn a_full_machine_of_idle_small_slices_is_repartitioned_beside_a_running_neighbour() {
    let one_gpu = "driver_version = \"550.54.15\"\n[[gpu]]\nmodel = \"A100-40GB\"\ncount = 1\nmig = true\n";
    let site = Site::builder().machine(one_gpu).start();
    let neighbour = site.person("neighbour");
    let others: Vec<Person> = (1..=6).map(|n| site.person(&format!("other{n}"))).collect();
    let kept = neighbour.ssh("echo $NVIDIA_VISIBLE_DEVICES").success().text();
    for other in &others {
        other.ssh("true").success();
    }
    assert_eq!(slices(&site, "1g.5gb").len(), 7, "the machine is full of small slices");
    for other in &others {
        other.ssh("mlad workspace stop");
    }
    eventually("six are idle", Duration::from_secs(60), || site.containers().len() == 1);

    let big = site.person("big");
    let device = big.ssh_command(&["-o", "SetEnv=MLAD_GPU=3g.20gb"], &["echo $NVIDIA_VISIBLE_DEVICES"]);
    let device = Outcome::of(&mut { device }).success().text();
    assert_eq!(slices(&site, "3g.20gb"), [device]);
    assert_eq!(
        neighbour.ssh("echo $NVIDIA_VISIBLE_DEVICES").success().text(),
        kept,
        "the neighbour's slice is as it was"
    );
    assert!(slices(&site, "1g.5gb").contains(&kept));
}

fn slices(site: &Site, profile: &str) -> Vec<String> {
    let map = site.mlad_json(&["gpu"]);
    let gpus = map["gpus"].as_array().unwrap();
    let slices = gpus.iter().flat_map(|gpu| gpu["slices"].as_array().unwrap());
    slices.filter(|slice| slice["profile"] == profile).map(|slice| slice["uuid"].as_str().unwrap().into()).collect()
}

#[test]
fn whoever_waits_without_a_terminal_waits_silently_and_gives_the_place_back_when_gone() {
    let small = "driver_version = \"550.54.15\"\n[[gpu]]\nmodel = \"A30-24GB\"\ncount = 1\nmig = true\n";
    let site = Site::builder().machine(small).setting("workspace", "default_need = \"4g.24gb\"").start();
    let (holder, waiter) = (site.person("holder"), site.person("waiter"));
    holder.ssh("true").success();
    let waiting = waiter.start(&[], &["echo in"]);
    eventually("the second waits", Duration::from_secs(30), || places(&site) == [1]);
    drop(waiting);
    eventually("the place is given back", Duration::from_secs(30), || places(&site).is_empty());
    let waiting = waiter.start(&[], &["echo in"]);
    eventually("the second waits again", Duration::from_secs(30), || places(&site) == [1]);
    site.mlad(&["admin", "stop", &workload_of(&site, "holder")]).success();
    let mut waiting = waiting;
    assert_eq!(waiting.lines().next(LONG), "in");
}

#[test]
fn a_wait_that_is_too_long_ends_with_a_clear_line() {
    let small = "driver_version = \"550.54.15\"\n[[gpu]]\nmodel = \"A30-24GB\"\ncount = 1\nmig = true\n";
    let site = Site::builder()
        .machine(small)
        .setting("workspace", "default_need = \"4g.24gb\"")
        .setting("workspace", "wait_without_terminal_seconds = 2")
        .start();
    site.person("holder").ssh("true").success();
    let outcome = site.person("waiter").ssh("true");
    assert_eq!(outcome.code, 75, "{}", outcome.stderr);
    assert!(outcome.stderr.starts_with("mlad: ") && outcome.stdout.is_empty(), "{}", outcome.stderr);
}

#[test]
fn an_idle_workspace_gives_its_slice_back() {
    let site = Site::builder().setting("workspace", "idle_minutes = 0").start();
    let alice = site.person("alice");
    alice.ssh("true").success();
    eventually("container and lease are gone", Duration::from_secs(60), || {
        site.containers().is_empty() && site.mlad_json(&["who"])["leases"].as_array().unwrap().is_empty()
    });
    let first = eventually_some("it is shown as stopped", Duration::from_secs(10), || {
        let list = site.mlad_json(&["workspace", "ls", "--all"]);
        (list["workspaces"][0]["state"] == "stopped").then(|| list["workspaces"][0]["name"].clone())
    });
    assert_eq!(first, "default");
}

#[test]
fn impossible_needs_are_refused_at_once_with_what_would_fit() {
    let site = Site::start();
    let alice = site.person("alice");
    for need in ["9g.99gb", "500G"] {
        let outcome = Outcome::of(&mut alice.ssh_command(&["-o", &format!("SetEnv=MLAD_GPU={need}")], &["true"]));
        assert_eq!(outcome.code, 2, "{}", outcome.stderr);
        assert!(outcome.stderr.contains("7g.40gb"), "says what would fit: {}", outcome.stderr);
    }
    let by_memory = Outcome::of(&mut alice.ssh_command(&["-o", "SetEnv=MLAD_GPU=9G"], &["true"])).success();
    assert!(by_memory.stderr.is_empty());
    let who = site.mlad_json(&["who"]);
    assert_eq!(who["leases"][0]["profile"], "1g.10gb", "the smallest with that much");
}

#[test]
fn whoever_works_on_a_gpu_that_fails_is_told_and_nobody_gets_it_next() {
    let machine = "[[gpu]]\nmodel = \"A100-40GB\"\ncount = 1\nmig = true\n";
    let site = Site::builder().machine(machine).start();
    let (alice, bob) = (site.person("alice"), site.person("bob"));
    let mut client = alice.start(&["-tt"], &["echo in; sleep 1000"]);
    client.lines().find(LONG, |line| line.contains("in").then_some(()));
    let told = Lines::of(client.child.stderr.take().unwrap());
    site.nvml_sim(&["xid", "0", "95"]).success();
    told.find(LONG, |line| (line.contains("your GPU is not well") && line.contains("XID 95")).then_some(()));
    let gpus = site.mlad_json(&["gpu"]);
    assert!(gpus["gpus"][0]["fault"].as_str().is_some_and(|fault| fault.contains("quarantine")), "{gpus}");
    assert!(site.mlad(&["who"]).success().text().contains("not well"));

    let mut waits = bob.start(&[], &["echo $NVIDIA_VISIBLE_DEVICES"]);
    eventually("bob waits", LONG, || {
        let who = site.mlad_json(&["who"]);
        who["waits"].as_array().unwrap().iter().any(|wait| wait["detail"].as_str().unwrap().contains("quarantine"))
    });
    let uuid = gpus["gpus"][0]["uuid"].as_str().unwrap();
    site.admin(&["node", "trust", uuid]).success();
    let his = waits.lines();
    assert!(his.next(LONG).starts_with("MIG-"));
    assert_eq!(waits.ends(LONG), Some(0));
}

#[test]
fn a_workspace_that_does_not_use_its_gpu_is_warned_and_gives_it_back() {
    let site = Site::builder().setting("workspace", "unused_gpu_minutes = 1").start();
    let alice = site.person("alice");
    let mut client = alice.start(&["-tt"], &["echo in; sleep 1000"]);
    client.lines().find(LONG, |line| line.contains("in").then_some(()));
    let told = Lines::of(client.child.stderr.take().unwrap());
    told.find(LONG, |line| (line.contains("your workspace ends at") && line.contains("not used")).then_some(()));
    told.find(LONG, |line| line.contains("not used for 1 minute").then_some(()));
    assert!(client.ends(LONG).is_some());
    eventually("its slice is free", LONG, || site.mlad_json(&["who"])["leases"].as_array().unwrap().is_empty());
}
