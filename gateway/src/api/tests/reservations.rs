//! Reservations over the API: administrators make them, those they are for see and use them, nobody else.

use super::*;

#[tokio::test]
async fn a_reservation_is_made_seen_by_whom_it_is_for_and_every_act_is_written_down() {
    let site = Site::start().await;
    let (root, alice, bob) = (site.root(), site.person("alice"), site.person("bob"));
    root.add_project(&NewProject { name: "vision".into(), parent: None }).await.unwrap();
    root.add_member("vision", "alice").await.unwrap();
    let until = Timestamp::now().checked_add(SignedDuration::from_hours(1)).unwrap();
    let new = |user: &str| NewReservation {
        name: "course".into(),
        need: "1g.5gb".parse().unwrap(),
        slices: 1,
        from: None,
        until,
        users: vec![user.into()],
        projects: vec!["vision".into()],
    };
    assert_eq!(code(root.reserve(&new("nobody-here")).await), ErrorCode::NotFound);
    assert_eq!(code(bob.reserve(&new("bob")).await), ErrorCode::Denied);
    let made = root.reserve(&new("alice")).await.unwrap();
    assert_eq!((made.name.as_str(), made.until), ("course", until));
    assert_eq!(root.all_reservations().await.unwrap().reservations.len(), 1);
    assert_eq!(code(bob.all_reservations().await), ErrorCode::Denied);
    assert_eq!(alice.reservations().await.unwrap().reservations[0].name, "course");
    assert!(bob.reservations().await.unwrap().reservations.is_empty());

    let within =
        |name: &str, need: &str| spec(&format!(r#"{{"command": ["x"], "need": "{need}", "reservation": "{name}"}}"#));
    for name in ["course", "nothing"] {
        let error = match bob.submit(&within(name, "1g.5gb")).await {
            Err(ClientError::Api(error)) => error,
            other => panic!("{other:?}"),
        };
        assert_eq!(error.message, format!("there is no reservation {name} that you may use for this project"));
    }
    assert_eq!(code(alice.submit(&within("course", "cpu")).await), ErrorCode::Conflict);
    assert_eq!(code(root.remove_reservation("nothing").await), ErrorCode::NotFound);
    root.remove_reservation("course").await.unwrap();
    assert!(root.all_reservations().await.unwrap().reservations.is_empty());
    let acts: Vec<String> = root.audit(100).await.unwrap().events.into_iter().map(|event| event.action).collect();
    for act in ["reservation.add", "reservation.remove"] {
        assert!(acts.iter().any(|done| done == act), "{act}: {acts:?}");
    }
}
