//! Grants, refusals, limits, order.

use super::{ask, ended, get, granted, host::Host, machine::Machine, until, waiting};
use jiff::{SignedDuration, Timestamp};
use mlad::api::{Need, NewReservation, SliceState, WaitReason};
use mlad_allocator::{Account, AccountName, Allocate, AllocatorError, LeaseRequest, LeaseState, Limits};
use std::time::Duration;
use tokio::time::timeout;

/// 24 of 40 requests for 2g.10gb fit on eight A100; the rest wait, their places counting down.
pub(crate) async fn forty_people(host: Host) {
    let machine = Machine::new("A100-40GB", 8);
    let running = host.start(&machine).await;
    let allocator = running.allocator();
    let name = |nth: usize| format!("w-{nth}-1");
    for nth in 0..40 {
        allocator.request(&ask(&name(nth), &format!("user{nth}"), "2g.10gb")).await.unwrap();
    }
    let mut uuids = Vec::new();
    for nth in 0..24 {
        uuids.extend(granted(allocator, &name(nth)).await.uuids);
    }
    uuids.sort();
    uuids.dedup();
    assert_eq!(uuids.len(), 24, "no two have the same");
    let mut there: Vec<String> = machine.slices().into_iter().map(|(_, uuid)| uuid).collect();
    there.sort();
    assert_eq!(uuids, there);
    let places = async || -> Vec<(String, u32, u32)> {
        allocator.waits().await.unwrap().into_iter().map(|w| (w.workload, w.place, w.waiting)).collect()
    };
    let expected = |from: usize| -> Vec<(String, u32, u32)> {
        (from..40).zip(1..).map(|(nth, place)| (name(nth), place, (40 - from) as u32)).collect()
    };
    assert_eq!(places().await, expected(24));
    let (first, second) = (waiting(allocator, &name(24)).await, waiting(allocator, &name(25)).await);
    assert_eq!((first.reason, second.reason), (WaitReason::NoSlice, WaitReason::Priority));
    assert!(first.detail.contains("2g.10gb") && first.detail.contains("1g.5gb"), "{}", first.detail);
    assert!(second.detail.contains("user24"), "{}", second.detail);
    for left in 0..16 {
        allocator.release(&name(left)).await.unwrap();
        granted(allocator, &name(24 + left)).await;
        assert_eq!(places().await, expected(25 + left));
    }
    assert_eq!(machine.slices().len(), 24);
    running.stop().await;
}

/// Idle instances give way to a larger one; a neighbour that is leased keeps its UUID.
pub(crate) async fn repartition(host: Host) {
    let machine = Machine::new("A100-40GB", 1);
    let running = host.start(&machine).await;
    let allocator = running.allocator();
    for nth in 0..7 {
        get(allocator, &format!("w-{nth}-1"), "1g.5gb").await;
    }
    let neighbour =
        allocator.leases().await.unwrap().into_iter().find(|l| l.slices[0].placement.unwrap().start == 2).unwrap();
    for lease in allocator.leases().await.unwrap() {
        if lease.workload != neighbour.workload {
            allocator.release(&lease.workload).await.unwrap();
        }
    }
    assert_eq!(machine.slices().len(), 7, "idle instances stay until their space is needed");
    let large = get(allocator, "w-8-1", "3g.20gb").await;
    assert_eq!((large.profile.as_str(), large.slices[0].placement.unwrap().start), ("3g.20gb", 4));
    let slices = machine.slices();
    assert_eq!(slices.len(), 5, "four small ones and the large one");
    assert!(slices.iter().any(|(_, uuid)| *uuid == neighbour.uuids[0]));
    assert!(slices.iter().any(|(_, uuid)| *uuid == large.uuids[0]));
    let again = allocator.renew(&neighbour.workload, neighbour.fence).await.unwrap();
    assert_eq!(again.uuids, neighbour.uuids);
    let map = allocator.map().await.unwrap();
    let states: Vec<SliceState> = map.gpus[0].slices.iter().map(|slice| slice.state).collect();
    use SliceState::{Idle, Leased};
    assert_eq!(states, [Idle, Idle, Leased, Idle, Leased]);
    assert_eq!(map.gpus[0].slices[2].holder.as_ref().unwrap().user, "alice");
    let room = |profile: &str| map.gpus[0].profiles.iter().find(|room| room.profile == profile).unwrap().free;
    assert_eq!((room("1g.5gb"), room("2g.10gb"), room("3g.20gb"), room("7g.40gb")), (3, 1, 0, 0));
    running.stop().await;
}

/// What can never fit is refused at once, naming what would; typed, also over the wire.
pub(crate) async fn refusals(host: Host) {
    let machine = Machine::new("A100-40GB", 1);
    let running = host.start(&machine).await;
    let allocator = running.allocator();
    let refused = async |request: &LeaseRequest| allocator.request(request).await.unwrap_err();
    let error = refused(&ask("w-1-1", "alice", "5g.40gb")).await;
    assert!(matches!(&error, AllocatorError::Impossible(text) if text.contains("7g.40gb")), "{error}");
    let error = refused(&ask("w-1-1", "alice", "100G")).await;
    assert!(matches!(&error, AllocatorError::Impossible(text) if text.contains("39.")), "{error}");
    let limits = Limits { slices: None, gpu_memory_mib: Some(10_000), gpu_seconds: None };
    let error = refused(&LeaseRequest { limits, ..ask("w-1-1", "alice", "3g.20gb") }).await;
    assert!(matches!(&error, AllocatorError::Quota(text) if text.contains("19.5 GiB")), "{error}");
    let error = refused(&ask("../w", "alice", "1g.5gb")).await;
    assert!(matches!(error, AllocatorError::Invalid(_)), "{error}");
    let error = refused(&ask("w-1-1", "", "1g.5gb")).await;
    assert!(matches!(error, AllocatorError::Invalid(_)), "{error}");
    // A refusal is not remembered.
    get(allocator, "w-1-1", "1g.5gb").await;
    let error = allocator.state("w-2-1").await.unwrap_err();
    assert_eq!(error, AllocatorError::Unknown("w-2-1".into()));
    running.stop().await;
}

/// Every call can be repeated.
pub(crate) async fn repeats(host: Host) {
    let machine = Machine::new("A100-40GB", 1);
    let running = host.start(&machine).await;
    let allocator = running.allocator();
    let lease = get(allocator, "w-1-1", "2g.10gb").await;
    let again = allocator.request(&ask("w-1-1", "bob", "7g.40gb")).await.unwrap();
    assert_eq!(again, LeaseState::Granted(lease.clone()), "the first request stands");
    let renewed = allocator.renew("w-1-1", lease.fence).await.unwrap();
    assert!(renewed.expires_at >= lease.expires_at);
    let error = allocator.renew("w-1-1", lease.fence + 1).await.unwrap_err();
    assert_eq!(error, AllocatorError::Fence("w-1-1".into()));
    for _ in 0..2 {
        allocator.release("w-1-1").await.unwrap();
    }
    allocator.release("w-never-1").await.unwrap();
    assert_eq!(ended(allocator, "w-1-1").await, "released");
    let gone = AllocatorError::Ended("w-1-1".into());
    assert_eq!(allocator.renew("w-1-1", lease.fence).await.unwrap_err(), gone);
    assert_eq!(allocator.request(&ask("w-1-1", "alice", "2g.10gb")).await.unwrap_err(), gone);
    let next = get(allocator, "w-1-2", "2g.10gb").await;
    assert!(next.fence > lease.fence);
    assert_eq!(next.uuids, lease.uuids, "the idle instance is used again as it is");
    running.stop().await;
}

/// Several slices come at once, and go at once.
pub(crate) async fn gangs(host: Host) {
    let machine = Machine::new("A100-40GB", 2);
    let running = host.start(&machine).await;
    let allocator = running.allocator();
    let gang = |workload: &str| LeaseRequest { slices: 3, ..ask(workload, "alice", "3g.20gb") };
    allocator.request(&gang("j-1-1")).await.unwrap();
    let lease = granted(allocator, "j-1-1").await;
    assert_eq!((lease.uuids.len(), lease.slices.len()), (3, 3));
    allocator.request(&gang("j-2-1")).await.unwrap();
    let wait = waiting(allocator, "j-2-1").await;
    assert!(wait.detail.contains("3 times 3g.20gb at once"), "{}", wait.detail);
    allocator.request(&ask("w-1-1", "alice", "1g.5gb")).await.unwrap();
    assert_eq!(waiting(allocator, "w-1-1").await.reason, WaitReason::Priority, "what is free is kept for the gang");
    allocator.release("j-1-1").await.unwrap();
    assert_eq!(granted(allocator, "j-2-1").await.uuids.len(), 3);
    granted(allocator, "w-1-1").await;
    running.stop().await;
}

/// Limits of projects are kept over a restart, and what is held counts on.
pub(crate) async fn accounts(host: Host) {
    let machine = Machine::new("A100-40GB", 1);
    let running = host.start(&machine).await;
    let project = |slices| Account {
        name: AccountName::Project("vision".to_owned()),
        parent: Some("lab".to_owned()),
        shares: 7,
        limits: Limits { slices: Some(slices), ..Limits::default() },
    };
    running.allocator().set_accounts(&[project(1)]).await.unwrap();
    let of_project =
        |workload: &str| LeaseRequest { project: Some("vision".to_owned()), ..ask(workload, "alice", "1g.5gb") };
    running.allocator().request(&of_project("w-1-1")).await.unwrap();
    granted(running.allocator(), "w-1-1").await;
    running.stop().await;
    let running = host.start(&machine).await;
    let allocator = running.allocator();
    let states = allocator.accounts().await.unwrap();
    let vision = states.iter().find(|state| state.account == project(1)).expect("it is kept");
    assert_eq!(vision.slices, 1);
    let lab = AccountName::Project("lab".to_owned());
    assert!(states.iter().any(|state| state.account.name == lab && state.slices == 1), "{states:?}");
    allocator.request(&of_project("w-2-1")).await.unwrap();
    assert_eq!(waiting(allocator, "w-2-1").await.reason, WaitReason::Quota);
    allocator.set_accounts(&[project(2)]).await.unwrap();
    granted(allocator, "w-2-1").await;
    let circle =
        Account { name: AccountName::Project("lab".to_owned()), parent: Some("vision".to_owned()), ..project(1) };
    let error = allocator.set_accounts(&[circle]).await.unwrap_err();
    assert!(matches!(&error, AllocatorError::Invalid(text) if text.contains("lies within itself")), "{error}");
    running.stop().await;
}

/// What is reserved outlives a restart, and is there for those it is for.
pub(crate) async fn reservations(host: Host) {
    let machine = Machine::new("A100-40GB", 1);
    let running = host.start(&machine).await;
    let minutes = |minutes: i64| Timestamp::now().checked_add(SignedDuration::from_mins(minutes)).unwrap();
    let new = NewReservation {
        name: "course".to_owned(),
        need: "3g.20gb".parse().unwrap(),
        slices: 2,
        from: None,
        until: minutes(60),
        users: vec!["bob".to_owned()],
        projects: vec!["vision".to_owned()],
    };
    let made = running.allocator().reserve(&new).await.unwrap();
    assert_eq!((made.places.len(), made.active, made.trouble.clone()), (2, true, None));
    let other = NewReservation { name: "other".to_owned(), ..new.clone() };
    let error = running.allocator().reserve(&other).await.unwrap_err();
    assert!(matches!(&error, AllocatorError::Reservation(text) if text.contains("course")), "{error}");
    running.stop().await;
    let running = host.start(&machine).await;
    let allocator = running.allocator();
    assert_eq!(allocator.reservations().await.unwrap(), std::slice::from_ref(&made), "as it was");
    assert_eq!(allocator.reserve(&new).await.unwrap().places, made.places, "the same again changes nothing");
    allocator.request(&ask("w-1-1", "alice", "1g.5gb")).await.unwrap();
    let wait = waiting(allocator, "w-1-1").await;
    assert_eq!(wait.reason, WaitReason::Reserved, "{}", wait.detail);
    let within = |workload: &str, user: &str, need: &str| LeaseRequest {
        reservation: Some("course".to_owned()),
        ..ask(workload, user, need)
    };
    let error = allocator.request(&within("w-2-1", "alice", "2g.10gb")).await.unwrap_err();
    assert!(matches!(&error, AllocatorError::Reservation(text) if text.contains("is not for alice")), "{error}");
    allocator.request(&within("w-2-1", "bob", "2g.10gb")).await.unwrap();
    let lease = granted(allocator, "w-2-1").await;
    assert_eq!(lease.expected_end, Some(made.until), "it ends with the reservation");
    assert_eq!(allocator.reservations().await.unwrap()[0].in_use, 1);
    running.stop().await;
    let running = host.start(&machine).await;
    let allocator = running.allocator();
    assert_eq!(granted(allocator, "w-2-1").await.expected_end, Some(made.until), "over a restart too");
    allocator.request(&within("w-3-1", "bob", "3g.20gb")).await.unwrap();
    granted(allocator, "w-3-1").await;
    allocator.request(&within("w-4-1", "bob", "3g.20gb")).await.unwrap();
    assert_eq!(waiting(allocator, "w-4-1").await.reason, WaitReason::Reserved);
    for _ in 0..2 {
        allocator.cancel_reservation("course").await.unwrap();
    }
    assert!(ended(allocator, "w-4-1").await.contains("was removed"));
    granted(allocator, "w-1-1").await;
    granted(allocator, "w-2-1").await;
    running.stop().await;
}

/// A user's own limits hold back that user only.
pub(crate) async fn quotas(host: Host) {
    let machine = Machine::new("A100-40GB", 1);
    let running = host.start(&machine).await;
    let allocator = running.allocator();
    let limited = |workload: &str, need: &str| LeaseRequest {
        limits: Limits { slices: Some(2), gpu_memory_mib: Some(20_000), gpu_seconds: None },
        ..ask(workload, "bob", need)
    };
    allocator.request(&limited("w-1-1", "2g.10gb")).await.unwrap();
    allocator.request(&limited("w-2-1", "3g.20gb")).await.unwrap();
    let wait = waiting(allocator, "w-2-1").await;
    assert_eq!(wait.reason, WaitReason::Quota);
    assert!(wait.detail.contains("bob holds 1 of 2 slices and 9.6 of 19.5 GiB"), "{}", wait.detail);
    allocator.request(&limited("w-3-1", "1g.5gb")).await.unwrap();
    granted(allocator, "w-3-1").await;
    allocator.request(&limited("w-4-1", "cpu")).await.unwrap();
    granted(allocator, "w-4-1").await;
    get(allocator, "w-5-1", "1g.5gb").await;
    allocator.release("w-1-1").await.unwrap();
    assert_eq!(waiting(allocator, "w-2-1").await.reason, WaitReason::Quota, "1g.5gb and 3g.20gb are too much still");
    allocator.release("w-3-1").await.unwrap();
    granted(allocator, "w-2-1").await;
    running.stop().await;
}

/// By profile, by memory, a whole one, none.
pub(crate) async fn kinds_of_need(host: Host) {
    let machine = Machine::new("A100-40GB", 2);
    let running = host.start(&machine).await;
    let allocator = running.allocator();
    let resolved = async |need: &str| allocator.resolve(&need.parse::<Need>().unwrap()).await.unwrap().profile;
    assert_eq!(resolved("10G").await, "1g.10gb");
    assert_eq!(resolved("7g.39gb").await, "7g.40gb", "as another driver spells it");
    let memory = get(allocator, "w-1-1", "10G").await;
    assert_eq!((memory.profile.as_str(), memory.memory_mib), ("1g.10gb", 9856));
    let whole = get(allocator, "w-2-1", "gpu").await;
    assert_eq!((whole.profile.as_str(), whole.need.clone()), ("7g.40gb", Need::Gpu));
    assert_ne!(whole.slices[0].gpu_index, memory.slices[0].gpu_index);
    allocator.request(&ask("w-3-1", "bob", "gpu")).await.unwrap();
    waiting(allocator, "w-3-1").await;
    let none = get(allocator, "w-4-1", "cpu").await;
    assert_eq!((none.profile.as_str(), none.uuids.len(), none.slices.len()), ("cpu", 0, 0));
    allocator.release("w-1-1").await.unwrap();
    granted(allocator, "w-3-1").await;
    running.stop().await;
}

/// GPUs with MIG and without in one machine.
pub(crate) async fn two_models(host: Host) {
    let machine = Machine::described("[[gpu]]\nmodel = \"A100-40GB\"\n[[gpu]]\nmodel = \"A30-24GB\"\nmig = true\n");
    let running = host.start(&machine).await;
    let allocator = running.allocator();
    let small = get(allocator, "w-1-1", "5G").await;
    assert_eq!((small.profile.as_str(), small.slices[0].gpu_index), ("1g.6gb", 1), "a slice rather than a whole GPU");
    let map = allocator.map().await.unwrap();
    assert_eq!((map.gpus[0].mig, map.gpus[0].columns, map.gpus[0].slices.len()), (false, 0, 0));
    assert_eq!(map.gpus[0].profiles[0].profile, "gpu");
    let large = get(allocator, "w-2-1", "gpu").await;
    assert_eq!((large.profile.as_str(), large.slices[0].gpu_index, large.slices[0].placement), ("gpu", 0, None));
    assert_eq!(large.uuids, [map.gpus[0].uuid.clone()]);
    assert_eq!(allocator.map().await.unwrap().gpus[0].slices[0].state, SliceState::Leased);
    allocator.request(&ask("w-3-1", "bob", "30G")).await.unwrap();
    assert_eq!(waiting(allocator, "w-3-1").await.reason, WaitReason::NoSlice);
    let other = get(allocator, "w-4-1", "2g.12gb").await;
    assert_eq!(other.slices[0].gpu_index, 1, "who waits for the A100 does not keep others off the A30");
    allocator.release("w-2-1").await.unwrap();
    assert_eq!(granted(allocator, "w-3-1").await.slices[0].gpu_index, 0);
    running.stop().await;
}

/// A revoked lease cannot be renewed; its slice is held until it is released, or freed at once.
pub(crate) async fn revocation(host: Host) {
    let machine = Machine::new("A100-40GB", 1);
    let running = host.start(&machine).await;
    let allocator = running.allocator();
    let lease = get(allocator, "w-1-1", "7g.40gb").await;
    allocator.request(&ask("w-2-1", "bob", "7g.40gb")).await.unwrap();
    allocator.request(&ask("w-3-1", "carol", "7g.40gb")).await.unwrap();
    allocator.revoke("w-3-1", "the administrator said so", false).await.unwrap();
    assert_eq!(ended(allocator, "w-3-1").await, "the administrator said so");
    allocator.revoke("w-1-1", "the administrator said so", false).await.unwrap();
    assert_eq!(ended(allocator, "w-1-1").await, "the administrator said so");
    assert_eq!(allocator.renew("w-1-1", lease.fence).await.unwrap_err(), AllocatorError::Ended("w-1-1".into()));
    waiting(allocator, "w-2-1").await;
    assert_eq!(allocator.map().await.unwrap().gpus[0].slices[0].state, SliceState::Quarantined);
    allocator.release("w-1-1").await.unwrap();
    granted(allocator, "w-2-1").await;
    allocator.request(&ask("w-4-1", "dave", "7g.40gb")).await.unwrap();
    allocator.revoke("w-2-1", "gone for good", true).await.unwrap();
    granted(allocator, "w-4-1").await;
    assert_eq!(ended(allocator, "w-2-1").await, "gone for good");
    running.stop().await;
}

/// Who watches hears of changes, and of nothing else.
pub(crate) async fn changes(host: Host) {
    let machine = Machine::new("A100-40GB", 1);
    let running = host.start(&machine).await;
    let allocator: &dyn Allocate = running.allocator();
    let before = allocator.changed(0).await.unwrap();
    let changed = async |before: u64| {
        timeout(Duration::from_secs(60), allocator.changed(before)).await.expect("nothing is told").unwrap()
    };
    let (now, _) = tokio::join!(changed(before), get(allocator, "w-1-1", "cpu"));
    assert_ne!(now, before);
    let estimate = LeaseRequest { expected_seconds: Some(3600), ..ask("w-2-1", "bob", "7g.40gb") };
    allocator.request(&estimate).await.unwrap();
    let held = granted(allocator, "w-2-1").await;
    allocator.request(&ask("w-3-1", "carol", "1g.5gb")).await.unwrap();
    let told = until(allocator, async || waiting(allocator, "w-3-1").await.estimate).await;
    assert_eq!(told.duration_since(held.granted_at).as_secs(), 3600);

    // What is asked, what is only kept, and a GPU that is read and is as it was, are no changes.
    let before = allocator.changed(0).await.unwrap();
    allocator.renew("w-2-1", held.fence).await.unwrap();
    allocator.waits().await.unwrap();
    allocator.release("w-never-1").await.unwrap();
    allocator.request(&ask("w-4-1", "dave", "9g.99gb")).await.unwrap_err();
    let now = Timestamp::now();
    machine.change(|state| state.xid(0, 13, None).unwrap());
    // That it was read is told by nothing but the time of the reading.
    let read_anew = async { while allocator.map().await.unwrap().as_of <= now {} };
    timeout(Duration::from_secs(60), read_anew).await.expect("the event has the GPU read");
    assert_eq!(allocator.changed(0).await.unwrap(), before);
    allocator.release("w-3-1").await.unwrap();
    assert_ne!(changed(before).await, before);
    running.stop().await;
}
