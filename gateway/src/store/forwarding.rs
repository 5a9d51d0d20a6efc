//! What may be forwarded over SSH connections: per user and per project.

use super::{Store, StoreError};
use mlad::api::Forwarding;
use sqlx::{FromRow, Sqlite, query::QueryAs, sqlite::SqliteArguments};

/// What something was decided of.
type Decision<'q> = QueryAs<'q, Sqlite, PolicyRow, SqliteArguments>;

impl Store {
    /// What a user may forward by themselves.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn user_forwarding(&self, user_id: i64) -> Result<Forwarding, StoreError> {
        self.decided(sqlx::query_as("SELECT * FROM forwarding_policies WHERE user_id = $1").bind(user_id)).await
    }

    /// What the members of a project may forward.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn project_forwarding(&self, project_id: i64) -> Result<Forwarding, StoreError> {
        self.decided(sqlx::query_as("SELECT * FROM forwarding_policies WHERE project_id = $1").bind(project_id)).await
    }

    /// What a user may forward: what neither they nor a project they are a member of is forbidden, nor one that
    /// such a project lies in.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn forwarding_of(&self, user_id: i64) -> Result<Forwarding, StoreError> {
        let rows: Vec<PolicyRow> = sqlx::query_as(
            "WITH RECURSIVE mine (id) AS (SELECT project_id FROM project_members WHERE user_id = $1 \
             UNION SELECT p.parent_id FROM projects p JOIN mine ON p.id = mine.id WHERE p.parent_id IS NOT NULL) \
             SELECT * FROM forwarding_policies WHERE user_id = $1 OR project_id IN (SELECT id FROM mine)",
        )
        .bind(user_id)
        .fetch_all(self.read())
        .await?;
        Ok(rows.into_iter().map(Forwarding::from).fold(Forwarding::default(), Forwarding::and))
    }

    /// Changes what a user may forward by themselves.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn set_user_forwarding(&self, user_id: i64, forwarding: Forwarding) -> Result<(), StoreError> {
        let decision = sqlx::query_as(
            "INSERT INTO forwarding_policies (user_id, local, remote, agent, x11) VALUES ($1, $2, $3, $4, $5) \
             ON CONFLICT (user_id) DO UPDATE SET local = $2, remote = $3, agent = $4, x11 = $5 RETURNING *",
        );
        self.decide(decision.bind(user_id), forwarding).await
    }

    /// Changes what the members of a project may forward.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn set_project_forwarding(&self, project_id: i64, forwarding: Forwarding) -> Result<(), StoreError> {
        let decision = sqlx::query_as(
            "INSERT INTO forwarding_policies (project_id, local, remote, agent, x11) VALUES ($1, $2, $3, $4, $5) \
             ON CONFLICT (project_id) DO UPDATE SET local = $2, remote = $3, agent = $4, x11 = $5 RETURNING *",
        );
        self.decide(decision.bind(project_id), forwarding).await
    }

    async fn decided(&self, decision: Decision<'_>) -> Result<Forwarding, StoreError> {
        Ok(decision.fetch_optional(self.read()).await?.map(Forwarding::from).unwrap_or_default())
    }

    async fn decide(&self, decision: Decision<'_>, forwarding: Forwarding) -> Result<(), StoreError> {
        let Forwarding { local, remote, agent, x11 } = forwarding;
        let mut transaction = self.write().await?;
        decision.bind(local).bind(remote).bind(agent).bind(x11).fetch_one(&mut *transaction).await?;
        transaction.commit().await?;
        self.access_changed();
        Ok(())
    }
}

#[derive(FromRow)]
struct PolicyRow {
    local: bool,
    remote: bool,
    agent: bool,
    x11: bool,
}

impl From<PolicyRow> for Forwarding {
    fn from(row: PolicyRow) -> Self {
        Self { local: row.local, remote: row.remote, agent: row.agent, x11: row.x11 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlad::api::{NewProject, NewUser};

    #[tokio::test]
    async fn what_one_forbids_is_forbidden() {
        let folder = tempfile::tempdir().unwrap();
        let store = crate::testing::store(folder.path()).await;
        let all = Forwarding::default();
        let new = |name: &str| NewUser { name: name.into(), role: None, uid: None };
        let (alice, bob) = (store.add_user(&new("alice")).await.unwrap(), store.add_user(&new("bob")).await.unwrap());
        let mut projects = Vec::new();
        for (name, parent) in [("lab", None), ("team", Some("lab".to_owned()))] {
            projects.push(store.add_project(&NewProject { name: name.into(), parent }).await.unwrap());
        }
        assert_eq!(store.forwarding_of(alice.id).await.unwrap(), all);
        store.set_user_forwarding(alice.id, Forwarding { agent: false, ..all }).await.unwrap();
        store.set_user_forwarding(alice.id, Forwarding { x11: false, ..all }).await.unwrap();
        store.set_project_forwarding(projects[0].id, Forwarding { remote: false, ..all }).await.unwrap();
        store.set_project_forwarding(projects[1].id, Forwarding { local: false, ..all }).await.unwrap();
        assert_eq!(store.forwarding_of(alice.id).await.unwrap(), Forwarding { x11: false, ..all });
        assert_eq!(store.user_forwarding(alice.id).await.unwrap(), Forwarding { x11: false, ..all });
        assert_eq!(store.project_forwarding(projects[0].id).await.unwrap(), Forwarding { remote: false, ..all });
        store.add_member("team", alice.id).await.unwrap();
        let least = Forwarding { local: false, remote: false, agent: true, x11: false };
        assert_eq!(store.forwarding_of(alice.id).await.unwrap(), least, "the lab's holds in its team");
        assert_eq!(store.forwarding_of(bob.id).await.unwrap(), all);
        let mut changes = store.access_changes();
        changes.mark_unchanged();
        store.remove_member("team", alice.id).await.unwrap();
        assert!(changes.has_changed().unwrap(), "who is connected may forward again");
        assert_eq!(store.forwarding_of(alice.id).await.unwrap(), Forwarding { x11: false, ..all });
    }
}
