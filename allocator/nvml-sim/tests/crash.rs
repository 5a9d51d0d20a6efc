//! Processes that die while they write, and many that write at once.

#![allow(unsafe_code, reason = "instances are made by NVML's bare functions")]
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod common;

use std::process::{Command, Stdio};

use common::{Machine, Slices};
use nvml_wrapper::Nvml;
use nvml_wrapper::bitmasks::event::EventTypes;

/// Set in the processes that a test starts of itself: the library to churn.
const CHURN: &str = "NVML_SIM_TEST_CHURN";

/// Not a test of its own: what the processes do that are killed.
#[test]
#[ignore = "run by the tests below, in processes of its own"]
fn churn() {
    let Some(library) = std::env::var_os(CHURN) else { return };
    let nvml = Nvml::builder().lib_path(&library).init().unwrap();
    let slices = Slices::new(&nvml, 0);
    println!("churning");
    loop {
        for start in 0..7 {
            // Others churn too, so each step may find its place taken or its instance gone.
            if let Ok((instance, compute)) = slices.slice(19, start) {
                let _ = slices.destroy_compute(compute);
                let _ = slices.destroy(instance);
            }
        }
    }
}

fn start_churning(machine: &Machine) -> std::process::Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "churn", "--nocapture"])
        .env(CHURN, machine.library())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn killed_at_any_point_the_state_is_whole_and_nobody_is_locked_out() {
    let machine = Machine::a100(1);
    let nvml = machine.nvml();
    let slices = Slices::new(&nvml, 0);
    let mut changes = 0;
    for round in 0..30 {
        // What was before it is not told to a new set.
        let set = nvml.create_event_set().unwrap();
        let device = nvml.device_by_index(0).unwrap();
        let set = device.register_events(EventTypes::MIG_CONFIG_CHANGE, set).map_err(|error| error.error).unwrap();
        let mut children = [start_churning(&machine), start_churning(&machine)];
        // Until they have changed so much, each round a little more: then they are in the midst of the next
        // change, each somewhere else.
        for _ in 0..=round {
            set.wait(60_000).expect("they change nothing");
        }
        for child in &mut children {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        let state: serde_json::Value = serde_json::from_slice(&std::fs::read(machine.state_file()).unwrap()).unwrap();
        let left = state["gpus"][0]["instances"].as_array().unwrap().len();
        // What the killed left behind can be taken away, and the whole GPU be had.
        let instances = slices.instances(19);
        assert_eq!(instances.len(), left);
        for instance in instances {
            for compute in slices.compute_instances(instance, 0) {
                slices.destroy_compute(compute).unwrap();
            }
            slices.destroy(instance).unwrap();
        }
        let (instance, compute) = slices.slice(0, 0).unwrap();
        slices.destroy_compute(compute).unwrap();
        slices.destroy(instance).unwrap();
        changes += left;
    }
    assert!(changes > 0, "nobody was killed in the midst of anything");
}

#[test]
fn a_half_written_new_state_is_never_read() {
    let machine = Machine::a100(1);
    let nvml = machine.nvml();
    let slices = Slices::new(&nvml, 0);
    let (instance, _) = slices.slice(9, 4).unwrap();
    let mut new = machine.state_file().into_os_string();
    new.push(".new");
    std::fs::write(&new, "{\"version\": 1, \"gpus\": [{\"mod").unwrap();
    assert_eq!(slices.instances(9), [instance]);
    slices.create(9, 0).unwrap();
    assert_eq!(machine.tool(&["show"]).matches("3g.20gb").count(), 2);
    assert!(!std::path::Path::new(&new).exists());
}

#[test]
fn a_damaged_state_is_named_and_not_replaced() {
    let machine = Machine::a100(1);
    std::fs::write(machine.state_file(), "nonsense").unwrap();
    let output = machine.try_tool(&["show"]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1));
    assert!(text.contains("state.json") && text.contains("remove it"), "{text}");
    assert_eq!(std::fs::read(machine.state_file()).unwrap(), b"nonsense");
}

#[test]
fn a_state_that_was_removed_begins_anew() {
    let machine = Machine::a100(1);
    let nvml = machine.nvml();
    let slices = Slices::new(&nvml, 0);
    slices.slice(0, 0).unwrap();
    std::fs::remove_file(machine.state_file()).unwrap();
    assert_eq!(slices.instances(0), []);
    slices.slice(0, 0).unwrap();
}

#[test]
fn gpus_come_and_go_with_the_description() {
    let machine = Machine::a100(1);
    let nvml = machine.nvml();
    let uuid = nvml.device_by_index(0).unwrap().uuid().unwrap();
    std::fs::write(
        machine.file(),
        "[[gpu]]\nmodel = \"A100-40GB\"\nmig = true\n[[gpu]]\nmodel = \"H100-80GB\"\nmig = true\n",
    )
    .unwrap();
    machine.tool(&["create", "1", "1g.20gb"]);
    assert_eq!(nvml.device_count().unwrap(), 2);
    assert_eq!(nvml.device_by_index(0).unwrap().uuid().unwrap(), uuid);
    assert!(nvml.device_by_index(1).unwrap().mig_device_by_index(0).is_ok());
}

#[test]
fn threads_that_race_for_one_place_have_one_winner() {
    let machine = Machine::a100(1);
    let nvml = machine.nvml();
    let winners = std::thread::scope(|scope| {
        let racers: Vec<_> = (0..16)
            .map(|racer| {
                let nvml = &nvml;
                scope.spawn(move || Slices::new(nvml, 0).slice(19, racer % 7).is_ok())
            })
            .collect();
        racers.into_iter().map(|racer| racer.join().unwrap()).filter(|won| *won).count()
    });
    assert_eq!(winners, 7);
    assert_eq!(Slices::new(&nvml, 0).instances(19).len(), 7);
}
