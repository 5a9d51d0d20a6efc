//! Projects, their members and limits.

use super::{Store, StoreError, check_user_name, from_micros, to_micros, users::column};
use jiff::Timestamp;
use mlad::api::{NewProject, Project, ProjectLimits};
use sqlx::{FromRow, Sqlite, Transaction};
use std::collections::BTreeMap;

/// Projects lie in one another at most so deep: as deep as the allocator follows them.
const DEEPEST: usize = 8;
/// Most projects there can be.
const MOST: i64 = 10_000;

/// A project as the database holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProjectRecord {
    /// Number; never given twice.
    pub id: i64,
    /// Its name.
    pub name: String,
    /// The project it lies in.
    pub parent: Option<String>,
    /// What its members may hold together.
    pub limits: ProjectLimits,
    /// When it was made.
    pub created_at: Timestamp,
}

impl Store {
    /// The project of this name.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is none.
    pub async fn project(&self, name: &str) -> Result<ProjectRecord, StoreError> {
        let row: Option<ProjectRow> = sqlx::query_as(
            "SELECT p.*, q.name AS parent FROM projects p LEFT JOIN projects q ON q.id = p.parent_id WHERE p.name = $1",
        )
        .bind(name)
        .fetch_optional(self.read())
        .await?;
        row.ok_or_else(|| no_project(name))?.try_into()
    }

    /// All projects by name.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn projects(&self) -> Result<Vec<ProjectRecord>, StoreError> {
        let rows: Vec<ProjectRow> = sqlx::query_as(
            "SELECT p.*, q.name AS parent FROM projects p LEFT JOIN projects q ON q.id = p.parent_id ORDER BY p.name",
        )
        .fetch_all(self.read())
        .await?;
        rows.into_iter().map(TryInto::try_into).collect()
    }

    /// The names of the members of every project, by the project's number.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn project_members(&self) -> Result<BTreeMap<i64, Vec<String>>, StoreError> {
        let rows: Vec<(i64, String)> = sqlx::query_as(
            "SELECT m.project_id, u.name FROM project_members m JOIN users u ON u.id = m.user_id ORDER BY u.name",
        )
        .fetch_all(self.read())
        .await?;
        let mut members: BTreeMap<i64, Vec<String>> = BTreeMap::new();
        for (project, user) in rows {
            members.entry(project).or_default().push(user);
        }
        Ok(members)
    }

    /// Whether the user is a member of the project of this name; false if there is none.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn is_member(&self, user_id: i64, project: &str) -> Result<bool, StoreError> {
        let count: i64 = sqlx::query_scalar(
            "SELECT COUNT(*) FROM project_members m JOIN projects p ON p.id = m.project_id
             WHERE m.user_id = $1 AND p.name = $2",
        )
        .bind(user_id)
        .bind(project)
        .fetch_one(self.read())
        .await?;
        Ok(count > 0)
    }

    /// The project of this name and those it lies in, from within.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn project_chain(&self, name: &str) -> Result<Vec<ProjectRecord>, StoreError> {
        let mut all: BTreeMap<String, ProjectRecord> =
            self.projects().await?.into_iter().map(|project| (project.name.clone(), project)).collect();
        let mut next = Some(name.to_owned());
        let mut chain = Vec::new();
        while let Some(project) = next.take().and_then(|name| all.remove(&name)) {
            next.clone_from(&project.parent);
            chain.push(project);
        }
        Ok(chain)
    }

    /// What requests of a user count for that name no project.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn default_project(&self, user_id: i64) -> Result<Option<String>, StoreError> {
        Ok(sqlx::query_scalar(
            "SELECT p.name FROM users u JOIN projects p ON p.id = u.default_project_id WHERE u.id = $1",
        )
        .bind(user_id)
        .fetch_optional(self.read())
        .await?)
    }

    /// Says what requests of a user count for that name no project.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if the user is not a member of a project of this name.
    pub async fn set_default_project(&self, user_id: i64, project: Option<&str>) -> Result<(), StoreError> {
        let mut transaction = self.write().await?;
        let id: Option<i64> = match project {
            None => None,
            Some(name) => Some(
                sqlx::query_scalar(
                    "SELECT p.id FROM projects p JOIN project_members m ON m.project_id = p.id
                     WHERE p.name = $1 AND m.user_id = $2",
                )
                .bind(name)
                .bind(user_id)
                .fetch_optional(&mut *transaction)
                .await?
                .ok_or_else(|| no_project(name))?,
            ),
        };
        sqlx::query("UPDATE users SET default_project_id = $2 WHERE id = $1")
            .bind(user_id)
            .bind(id)
            .execute(&mut *transaction)
            .await?;
        Ok(transaction.commit().await?)
    }

    /// Makes a project without members and limits.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] when the name is none or taken, or it would lie too deep;
    /// [`StoreError::NotFound`] if there is no such parent.
    pub async fn add_project(&self, new: &NewProject) -> Result<ProjectRecord, StoreError> {
        check_project_name(&new.name)?;
        let mut transaction = self.write().await?;
        let count: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM projects").fetch_one(&mut *transaction).await?;
        if count >= MOST {
            return Err(StoreError::Conflict(format!("there are {MOST} projects, and no more can be")));
        }
        if project_id(&mut transaction, &new.name).await?.is_some() {
            return Err(StoreError::Conflict(format!("there is a project {} already", new.name)));
        }
        let parent = match &new.parent {
            None => None,
            Some(parent) => Some(parent_id(&mut transaction, parent).await?),
        };
        sqlx::query("INSERT INTO projects (name, parent_id, created_at) VALUES ($1, $2, $3)")
            .bind(&new.name)
            .bind(parent)
            .bind(to_micros(Timestamp::now()))
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        self.limits_changed();
        self.project(&new.name).await
    }

    /// Removes a project and its memberships. What runs goes on; queued jobs of it are held when they are looked at.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is none; [`StoreError::Conflict`] while others lie in it.
    pub async fn remove_project(&self, name: &str) -> Result<(), StoreError> {
        let mut transaction = self.write().await?;
        let id = project_id(&mut transaction, name).await?.ok_or_else(|| no_project(name))?;
        let within: Vec<String> = sqlx::query_scalar("SELECT name FROM projects WHERE parent_id = $1 ORDER BY name")
            .bind(id)
            .fetch_all(&mut *transaction)
            .await?;
        if !within.is_empty() {
            let within = within.join(", ");
            return Err(StoreError::Conflict(format!("{within} lie in the project {name}: remove them first")));
        }
        sqlx::query("DELETE FROM projects WHERE id = $1").bind(id).execute(&mut *transaction).await?;
        transaction.commit().await?;
        self.limits_changed();
        self.access_changed();
        Ok(())
    }

    /// Replaces the limits of a project.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is none; [`StoreError::Conflict`] for numbers that are too large.
    pub async fn set_project_limits(&self, name: &str, limits: &ProjectLimits) -> Result<ProjectRecord, StoreError> {
        let mut transaction = self.write().await?;
        let changed = sqlx::query(
            "UPDATE projects SET limit_slices = $2, limit_gpu_memory_mib = $3, limit_gpu_seconds = $4 WHERE name = $1",
        )
        .bind(name)
        .bind(limits.slices.map(i64::from))
        .bind(column("the limit of GPU memory", limits.gpu_memory_mib)?)
        .bind(column("the limit of GPU time", limits.gpu_seconds)?)
        .execute(&mut *transaction)
        .await?
        .rows_affected();
        if changed == 0 {
            return Err(no_project(name));
        }
        transaction.commit().await?;
        self.limits_changed();
        self.project(name).await
    }

    /// Makes a user a member of a project. Repeatable.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is no such project.
    pub async fn add_member(&self, project: &str, user_id: i64) -> Result<(), StoreError> {
        let mut transaction = self.write().await?;
        let id = project_id(&mut transaction, project).await?.ok_or_else(|| no_project(project))?;
        sqlx::query(
            "INSERT INTO project_members (project_id, user_id, added_at) VALUES ($1, $2, $3)
             ON CONFLICT (project_id, user_id) DO NOTHING",
        )
        .bind(id)
        .bind(user_id)
        .bind(to_micros(Timestamp::now()))
        .execute(&mut *transaction)
        .await?;
        transaction.commit().await?;
        self.access_changed();
        Ok(())
    }

    /// Ends a membership; if it was their default, that is none afterwards. What runs goes on.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is no such project, or they are not a member of it.
    pub async fn remove_member(&self, project: &str, user_id: i64) -> Result<(), StoreError> {
        let mut transaction = self.write().await?;
        let id = project_id(&mut transaction, project).await?.ok_or_else(|| no_project(project))?;
        let removed = sqlx::query("DELETE FROM project_members WHERE project_id = $1 AND user_id = $2")
            .bind(id)
            .bind(user_id)
            .execute(&mut *transaction)
            .await?
            .rows_affected();
        if removed == 0 {
            return Err(StoreError::NotFound { kind: "member of the project", name: project.into() });
        }
        sqlx::query("UPDATE users SET default_project_id = NULL WHERE id = $1 AND default_project_id = $2")
            .bind(user_id)
            .bind(id)
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        self.access_changed();
        Ok(())
    }
}

fn check_project_name(name: &str) -> Result<(), StoreError> {
    if name == Project::NONE {
        return Err(StoreError::Conflict(format!("the name {name} is reserved; choose another")));
    }
    check_user_name(name).map_err(|why| StoreError::Conflict(format!("a project is named like a user: {why}")))
}

async fn project_id(transaction: &mut Transaction<'static, Sqlite>, name: &str) -> Result<Option<i64>, StoreError> {
    Ok(sqlx::query_scalar("SELECT id FROM projects WHERE name = $1")
        .bind(name)
        .fetch_optional(&mut **transaction)
        .await?)
}

/// The project a new one is to lie in, if there is room for one more level.
async fn parent_id(transaction: &mut Transaction<'static, Sqlite>, name: &str) -> Result<i64, StoreError> {
    let parent = project_id(transaction, name).await?.ok_or_else(|| no_project(name))?;
    let (mut depth, mut above) = (1, Some(parent));
    while let Some(id) = above {
        depth += 1;
        if depth > DEEPEST {
            return Err(StoreError::Conflict(format!("projects lie in one another at most {DEEPEST} deep")));
        }
        above = sqlx::query_scalar("SELECT parent_id FROM projects WHERE id = $1")
            .bind(id)
            .fetch_one(&mut **transaction)
            .await?;
    }
    Ok(parent)
}

fn no_project(name: &str) -> StoreError {
    StoreError::NotFound { kind: "project", name: name.into() }
}

#[derive(FromRow)]
struct ProjectRow {
    id: i64,
    name: String,
    parent: Option<String>,
    limit_slices: Option<i64>,
    limit_gpu_memory_mib: Option<i64>,
    limit_gpu_seconds: Option<i64>,
    created_at: i64,
}

impl TryFrom<ProjectRow> for ProjectRecord {
    type Error = StoreError;

    fn try_from(row: ProjectRow) -> Result<Self, StoreError> {
        let slices = row.limit_slices.map(u32::try_from).transpose();
        let slices =
            slices.map_err(|error| StoreError::Corrupt { what: "limit of a project", reason: error.to_string() })?;
        Ok(Self {
            id: row.id,
            name: row.name,
            parent: row.parent,
            limits: ProjectLimits {
                slices,
                gpu_memory_mib: row.limit_gpu_memory_mib.map(i64::unsigned_abs),
                gpu_seconds: row.limit_gpu_seconds.map(i64::unsigned_abs),
            },
            created_at: from_micros(row.created_at)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlad::api::NewUser;

    async fn store() -> (tempfile::TempDir, Store) {
        let folder = tempfile::tempdir().unwrap();
        let store = crate::testing::store(folder.path()).await;
        (folder, store)
    }

    async fn user(store: &Store, name: &str) -> i64 {
        store.add_user(&NewUser { name: name.into(), role: None, uid: None }).await.unwrap().id
    }

    fn new(name: &str, parent: Option<&str>) -> NewProject {
        NewProject { name: name.into(), parent: parent.map(Into::into) }
    }

    #[tokio::test]
    async fn members_come_and_go_and_the_default_goes_with_them() {
        let (_folder, store) = store().await;
        let (alice, bob) = (user(&store, "alice").await, user(&store, "bob").await);
        let vision = store.add_project(&new("vision", None)).await.unwrap();
        assert!(store.set_default_project(alice, Some("vision")).await.is_err(), "she is no member");
        for _ in 0..2 {
            store.add_member("vision", alice).await.unwrap();
        }
        store.add_member("vision", bob).await.unwrap();
        assert_eq!(store.project_members().await.unwrap()[&vision.id], ["alice", "bob"]);
        store.set_default_project(alice, Some("vision")).await.unwrap();
        assert_eq!(store.default_project(alice).await.unwrap().as_deref(), Some("vision"));
        store.remove_member("vision", alice).await.unwrap();
        assert!(!store.is_member(alice, "vision").await.unwrap());
        assert_eq!(store.default_project(alice).await.unwrap(), None);
        assert!(store.remove_member("vision", alice).await.is_err());
        store.set_default_project(bob, Some("vision")).await.unwrap();
        store.remove_project("vision").await.unwrap();
        assert!(!store.is_member(bob, "vision").await.unwrap());
        assert_eq!(store.default_project(bob).await.unwrap(), None);
    }

    #[tokio::test]
    async fn limits_come_back_as_they_were_set_with_those_of_what_a_project_lies_in() {
        let (_folder, store) = store().await;
        store.add_project(&new("lab", None)).await.unwrap();
        store.add_project(&new("vision", Some("lab"))).await.unwrap();
        let limits = ProjectLimits { slices: Some(2), gpu_memory_mib: Some(81_920), gpu_seconds: Some(3600) };
        store.set_project_limits("lab", &limits).await.unwrap();
        let chain = store.project_chain("vision").await.unwrap();
        assert_eq!(chain.iter().map(|project| project.name.as_str()).collect::<Vec<_>>(), ["vision", "lab"]);
        assert_eq!((chain[0].limits, chain[1].limits), (ProjectLimits::default(), limits));
        assert!(store.remove_project("lab").await.is_err(), "vision lies in it");
    }

    #[tokio::test]
    async fn names_are_those_of_users_and_depth_is_bounded() {
        let (_folder, store) = store().await;
        for bad in ["", "..", "a/b", "Vision", "root", Project::NONE, "-x"] {
            assert!(store.add_project(&new(bad, None)).await.is_err(), "{bad}");
        }
        assert!(store.add_project(&new("orphan", Some("nothing"))).await.is_err());
        let mut parent: Option<String> = None;
        for depth in 1..=DEEPEST {
            let name = format!("p{depth}");
            store.add_project(&new(&name, parent.as_deref())).await.unwrap();
            parent = Some(name);
        }
        assert!(store.add_project(&new("deeper", parent.as_deref())).await.is_err());
        assert!(store.add_project(&new("p1", None)).await.is_err(), "the name is taken");
    }
}
