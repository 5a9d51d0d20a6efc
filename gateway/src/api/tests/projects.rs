//! Projects over the API: administrators make them, members see theirs, nobody else learns of them.

use super::*;

#[tokio::test]
async fn a_project_is_made_given_limits_and_members_and_every_act_is_written_down() {
    let site = Site::start().await;
    let (root, alice, bob) = (site.root(), site.person("alice"), site.person("bob"));
    let new = |name: &str, parent: Option<&str>| NewProject { name: name.into(), parent: parent.map(Into::into) };
    root.add_project(&new("lab", None)).await.unwrap();
    root.add_project(&new("vision", Some("lab"))).await.unwrap();
    assert_eq!(code(root.add_project(&new("vision", None)).await), ErrorCode::Conflict);
    assert_eq!(code(root.add_project(&new("../x", None)).await), ErrorCode::Conflict);
    let limits = ProjectLimits { slices: Some(1), gpu_memory_mib: None, gpu_seconds: Some(7200) };
    let project = root.set_project_limits("vision", &limits).await.unwrap();
    assert_eq!((project.limits, project.parent.as_deref()), (limits, Some("lab")));
    assert_eq!(project.used, Some(ProjectUse::default()));
    assert_eq!(root.add_member("vision", "alice").await.unwrap().members, ["alice"]);
    assert_eq!(code(root.add_member("vision", "nobody-here").await), ErrorCode::NotFound);

    // A member sees the project, but not what it lies in; others see nothing, and cannot tell it from none.
    let seen = alice.projects().await.unwrap();
    assert_eq!((seen.projects.len(), seen.projects[0].name.as_str()), (1, "vision"));
    assert_eq!(seen.projects[0].parent, None);
    assert!(bob.projects().await.unwrap().projects.is_empty());
    for project in ["vision", "nothing"] {
        let error = match bob.submit(&spec(&format!(r#"{{"command": ["x"], "project": "{project}"}}"#))).await {
            Err(ClientError::Api(error)) => error,
            other => panic!("{other:?}"),
        };
        assert_eq!(error.message, format!("there is no project {project} of which you are a member"));
    }
    assert_eq!(code(bob.set_default_project(Some("vision".into())).await), ErrorCode::NotFound);
    assert_eq!(code(bob.all_projects().await), ErrorCode::Denied);
    assert_eq!(code(bob.add_member("vision", "bob").await), ErrorCode::Denied);

    alice.set_default_project(Some("vision".into())).await.unwrap();
    assert_eq!(alice.projects().await.unwrap().default.as_deref(), Some("vision"));
    let refused = alice.submit(&spec(r#"{"command": ["x"], "need": "cpu", "priority": 1}"#)).await;
    assert_eq!(code(refused), ErrorCode::Denied);
    assert_eq!(code(root.remove_project("lab").await), ErrorCode::Conflict);
    root.remove_member("vision", "alice").await.unwrap();
    root.remove_project("vision").await.unwrap();
    assert_eq!(code(root.project("vision").await), ErrorCode::NotFound);
    let acts: Vec<String> = root.audit(100).await.unwrap().events.into_iter().map(|event| event.action).collect();
    for act in ["project.add", "project.quota", "project.member.add", "project.member.remove", "project.remove"] {
        assert!(acts.iter().any(|done| done == act), "{act}: {acts:?}");
    }
}
