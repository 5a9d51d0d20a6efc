//! Who held what, and what was used.

use super::{ask, get, host::Host, machine::Machine};
use jiff::{Timestamp, ToSpan, tz::TimeZone};
use mlad_allocator::{AllocatorError, LeaseRequest};

fn names(past: &mlad::api::Past) -> Vec<(&str, usize)> {
    past.leases.iter().map(|lease| (lease.workload.as_str(), lease.slices.len())).collect()
}

/// Who held which slice at a time is known over releases and restarts.
pub(crate) async fn who_held_what(host: Host) {
    let machine = Machine::new("A100-40GB", 1);
    let running = host.start(&machine).await;
    let allocator = running.allocator();
    let before = Timestamp::now();
    let gang = LeaseRequest { slices: 2, project: Some("vision".to_owned()), ..ask("j-1-1", "bob", "1g.5gb") };
    allocator.request(&gang).await.unwrap();
    super::granted(allocator, "j-1-1").await;
    let lease = get(allocator, "w-1-1", "3g.20gb").await;
    get(allocator, "w-9-1", "cpu").await;
    let during = Timestamp::now();
    allocator.release("w-1-1").await.unwrap();
    let after = Timestamp::now();
    running.stop().await;
    let running = host.start(&machine).await;
    let allocator = running.allocator();
    assert_eq!(names(&allocator.past(before).await.unwrap()), []);
    let past = allocator.past(during).await.unwrap();
    assert_eq!(names(&past), [("w-1-1", 1), ("j-1-1", 2)]);
    assert!(!past.incomplete);
    let [hers, his] = past.leases.as_slice() else { panic!("{past:?}") };
    assert_eq!((hers.user.as_str(), &hers.slices[0].uuid), ("alice", &lease.uuids[0]));
    assert_eq!(hers.reason.as_deref(), Some("released"));
    assert!(hers.ended_at.is_some_and(|end| (during..=after).contains(&end)), "{hers:?}");
    assert_eq!((his.project.as_deref(), his.ended_at), (Some("vision"), None));
    assert_eq!(names(&allocator.past(Timestamp::now()).await.unwrap()), [("j-1-1", 2)]);
    running.stop().await;
}

/// What was used is told by day, user and project, with what is held still.
pub(crate) async fn what_was_used(host: Host) {
    let machine = Machine::new("A100-40GB", 1);
    let running = host.start(&machine).await;
    let allocator = running.allocator();
    let begun = Timestamp::now();
    let gang = LeaseRequest { slices: 2, project: Some("vision".to_owned()), ..ask("j-1-1", "bob", "1g.5gb") };
    allocator.request(&gang).await.unwrap();
    let granted = super::granted(allocator, "j-1-1").await.granted_at;
    get(allocator, "w-1-1", "3g.20gb").await;
    allocator.release("w-1-1").await.unwrap();
    let today = begun.to_zoned(TimeZone::UTC).date();
    let tomorrow = today.tomorrow().unwrap();
    // Time has to pass for something to be used.
    let list = super::until_so(async || {
        let list = allocator.usage(today, tomorrow).await.unwrap();
        let bob: u64 =
            list.usage.iter().filter(|row| row.user.as_deref() == Some("bob")).map(|row| row.slice_seconds).sum();
        (bob >= 2).then_some(list)
    })
    .await;
    let now = Timestamp::now();
    let most = u64::try_from(now.duration_since(granted).as_secs() + 1).unwrap();
    let mut bob = list.usage.iter().filter(|row| row.user.as_deref() == Some("bob"));
    let first = bob.next().unwrap();
    assert_eq!((first.project.as_deref(), first.leases), (Some("vision"), 0));
    let slices = first.slice_seconds + bob.map(|row| row.slice_seconds).sum::<u64>();
    assert!((2..=2 * most).contains(&slices), "{list:?}");
    let alice: u64 = list.usage.iter().filter(|row| row.user.as_deref() == Some("alice")).map(|row| row.leases).sum();
    assert_eq!(alice, 1);
    for wrong in [[tomorrow, today], [today.checked_sub(3.years()).unwrap(), today]] {
        let refused = allocator.usage(wrong[0], wrong[1]).await.unwrap_err();
        assert!(matches!(refused, AllocatorError::Invalid(_)), "{refused}");
    }
    running.stop().await;
}
