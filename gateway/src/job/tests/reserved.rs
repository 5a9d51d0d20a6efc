//! Jobs within a reservation.

use super::*;
use jiff::{SignedDuration, Timestamp};
use mlad::api::NewReservation;
use mlad_allocator::Allocate;

#[tokio::test]
async fn a_job_whose_reservation_is_removed_before_it_starts_is_held_and_says_why() {
    let place = Place::new(1);
    let gateway = place.gateway().await;
    let allocator = FakeAllocator::new(&place.world, &CrashPoint::never());
    let new = NewReservation {
        name: "course".into(),
        need: "1g.5gb".parse().unwrap(),
        slices: 1,
        from: None,
        until: Timestamp::now().checked_add(SignedDuration::from_hours(1)).unwrap(),
        users: vec![gateway.user.name.clone()],
        projects: Vec::new(),
    };
    allocator.reserve(&new).await.unwrap();
    let first = gateway.submit(r#"{"command": ["train"], "need": "1g.5gb"}"#).await;
    gateway.until_state(first, JobState::Running).await;
    let second = gateway.submit(r#"{"command": ["train"], "need": "1g.5gb", "reservation": "course"}"#).await;
    gateway.until_state(second, JobState::Queued).await;
    place.world.until("it is asked for within the reservation", |world| world.waits_within("course") == 1).await;
    allocator.cancel_reservation("course").await.unwrap();
    let held = gateway.until_state(second, JobState::Held).await;
    assert!(held.detail.as_ref().unwrap().contains("no reservation course"), "{:?}", held.detail);
}
