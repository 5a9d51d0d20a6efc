//! Workspaces: what they are made of and where they are in their life.
//!
//! A transition is one UPDATE guarded by the state and generation it starts from: of two that would leave the
//! same state, one fails.

use super::{Store, StoreError, from_micros, to_micros};
use crate::workspace::{Life, State, workload_name};
use jiff::Timestamp;
use mlad::api::{Need, WorkspaceState};
use sqlx::{FromRow, QueryBuilder, Sqlite, Transaction};

/// A workspace as the database holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkspaceRecord {
    /// Number; never given twice.
    pub id: i64,
    /// Whose it is.
    pub user_id: i64,
    /// Their login name.
    pub user: String,
    /// Its name, one of its user's.
    pub name: String,
    /// Image by catalog name.
    pub image: String,
    /// Slice.
    pub need: Need,
    /// The project it counts for, since its last start.
    pub project: Option<String>,
    /// Where it is in its life.
    pub life: Life,
    /// When it was made.
    pub created_at: Timestamp,
}

impl WorkspaceRecord {
    /// Name of the workload of its generation.
    pub fn workload(&self) -> String {
        workload_name(self.id, self.life.generation)
    }
}

/// A workspace to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewWorkspace {
    /// Whose.
    pub user_id: i64,
    /// Its name.
    pub name: String,
    /// Image by catalog name.
    pub image: String,
    /// Slice.
    pub need: Need,
    /// When it is made.
    pub created_at: Timestamp,
}

impl Store {
    /// A user's workspace by name; none if there is none.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn workspace(&self, user_id: i64, name: &str) -> Result<Option<WorkspaceRecord>, StoreError> {
        let mut query = select();
        query.push(" WHERE w.user_id = ").push_bind(user_id).push(" AND w.name = ").push_bind(name);
        let row: Option<WorkspaceRow> = query.build_query_as().fetch_optional(self.read()).await?;
        row.map(TryInto::try_into).transpose()
    }

    /// A workspace by number; none if there is none.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn workspace_by_id(&self, id: i64) -> Result<Option<WorkspaceRecord>, StoreError> {
        let mut query = select();
        query.push(" WHERE w.id = ").push_bind(id);
        let row: Option<WorkspaceRow> = query.build_query_as().fetch_optional(self.read()).await?;
        row.map(TryInto::try_into).transpose()
    }

    /// The workspaces of one user, or of all, by user and name.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn workspaces(&self, user: Option<&str>) -> Result<Vec<WorkspaceRecord>, StoreError> {
        let mut query = select();
        if let Some(user) = user {
            query.push(" WHERE u.name = ").push_bind(user);
        }
        query.push(" ORDER BY u.name, w.name");
        let rows: Vec<WorkspaceRow> = query.build_query_as().fetch_all(self.read()).await?;
        rows.into_iter().map(TryInto::try_into).collect()
    }

    /// Every workspace that is not stopped.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn active_workspaces(&self) -> Result<Vec<WorkspaceRecord>, StoreError> {
        let mut query = select();
        query.push(" WHERE w.state <> 'stopped' ORDER BY w.id");
        let rows: Vec<WorkspaceRow> = query.build_query_as().fetch_all(self.read()).await?;
        rows.into_iter().map(TryInto::try_into).collect()
    }

    /// Makes a workspace, stopped; the one there is if the name is taken already. A stopped workspace is no
    /// more than the memory of an image and a slice: if the user has `most`, the stopped one that was not
    /// started for the longest time is forgotten.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] when the user has `most` and none is stopped; names those they have.
    pub async fn add_workspace(&self, new: &NewWorkspace, most: u32) -> Result<WorkspaceRecord, StoreError> {
        let mut transaction = self.write().await?;
        make_room(&mut transaction, new, most).await?;
        sqlx::query(
            "INSERT INTO workspaces (user_id, name, image, need, state, created_at)
             VALUES ($1, $2, $3, $4, 'stopped', $5) ON CONFLICT (user_id, name) DO NOTHING",
        )
        .bind(new.user_id)
        .bind(&new.name)
        .bind(&new.image)
        .bind(new.need.to_string())
        .bind(to_micros(new.created_at))
        .execute(&mut *transaction)
        .await?;
        let mut query = select();
        query.push(" WHERE w.user_id = ").push_bind(new.user_id).push(" AND w.name = ").push_bind(&new.name);
        let row: WorkspaceRow = query.build_query_as().fetch_one(&mut *transaction).await?;
        transaction.commit().await?;
        row.try_into()
    }

    /// Writes a transition from `before` to `after`, with what the workspace is made of.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] when the workspace is not (any more) as `before` says.
    pub async fn save_workspace(&self, before: &WorkspaceRecord, after: &WorkspaceRecord) -> Result<(), StoreError> {
        let columns = Columns::of(&after.life)?;
        let mut transaction = self.write().await?;
        let result = sqlx::query(
            "UPDATE workspaces SET image = $1, need = $2, project = $13, state = $3, detail = $4, generation = $5, fence = $6,
                 started_at = COALESCE($7, started_at), idle_deadline = $8, keep_until = $9
             WHERE id = $10 AND state = $11 AND generation = $12",
        )
        .bind(&after.image)
        .bind(after.need.to_string())
        .bind(state_name(after.life.name()))
        .bind(columns.detail)
        .bind(number("generation", after.life.generation)?)
        .bind(columns.fence)
        .bind(columns.started_at)
        .bind(columns.idle_deadline)
        .bind(columns.keep_until)
        .bind(before.id)
        .bind(state_name(before.life.name()))
        .bind(number("generation", before.life.generation)?)
        .bind(&after.project)
        .execute(&mut *transaction)
        .await?;
        if result.rows_affected() != 1 {
            return Err(StoreError::Conflict(format!(
                "the workspace {} of {} is not {} under generation {} any more",
                before.name,
                before.user,
                state_name(before.life.name()),
                before.life.generation
            )));
        }
        Ok(transaction.commit().await?)
    }
}

/// Forgets stopped workspaces until there is room for one more.
async fn make_room(
    transaction: &mut Transaction<'static, Sqlite>,
    new: &NewWorkspace,
    most: u32,
) -> Result<(), StoreError> {
    let others: Vec<(i64, String, String)> = sqlx::query_as(
        "SELECT id, name, state FROM workspaces WHERE user_id = $1 AND name <> $2
         ORDER BY COALESCE(started_at, created_at), id",
    )
    .bind(new.user_id)
    .bind(&new.name)
    .fetch_all(&mut **transaction)
    .await?;
    let surplus = (others.len() + 1).saturating_sub(usize::try_from(most).unwrap_or(usize::MAX));
    let stopped = others.iter().filter(|(_, _, state)| state == "stopped");
    let forgotten: Vec<i64> = stopped.take(surplus).map(|(id, ..)| *id).collect();
    if forgotten.len() < surplus {
        let names: Vec<&str> = others.iter().map(|(_, name, _)| name.as_str()).collect();
        return Err(StoreError::Conflict(names.join(", ")));
    }
    for id in forgotten {
        sqlx::query("DELETE FROM workspaces WHERE id = $1 AND state = 'stopped'")
            .bind(id)
            .execute(&mut **transaction)
            .await?;
    }
    Ok(())
}

fn select() -> QueryBuilder<Sqlite> {
    QueryBuilder::new("SELECT w.*, u.name AS user_name FROM workspaces w JOIN users u ON u.id = w.user_id")
}

#[derive(FromRow)]
struct WorkspaceRow {
    id: i64,
    user_id: i64,
    user_name: String,
    name: String,
    image: String,
    need: String,
    project: Option<String>,
    state: String,
    detail: Option<String>,
    generation: i64,
    fence: Option<i64>,
    created_at: i64,
    started_at: Option<i64>,
    idle_deadline: Option<i64>,
    keep_until: Option<i64>,
}

impl TryFrom<WorkspaceRow> for WorkspaceRecord {
    type Error = StoreError;

    fn try_from(row: WorkspaceRow) -> Result<Self, StoreError> {
        let life = Life { generation: row.generation.unsigned_abs(), state: state(&row)? };
        Ok(Self {
            id: row.id,
            user_id: row.user_id,
            user: row.user_name,
            name: row.name,
            image: row.image,
            need: row.need.parse().map_err(|error: mlad::api::NeedError| corrupt(error.to_string()))?,
            project: row.project,
            life,
            created_at: from_micros(row.created_at)?,
        })
    }
}

fn state(row: &WorkspaceRow) -> Result<State, StoreError> {
    let fence = || row.fence.map(i64::unsigned_abs).ok_or_else(|| corrupt("no fence".into()));
    Ok(match row.state.as_str() {
        "stopped" => State::Stopped { detail: row.detail.clone() },
        "waiting" => State::Waiting,
        "starting" => State::Starting { fence: fence()? },
        "running" => State::Running {
            fence: fence()?,
            started_at: from_micros(row.started_at.ok_or_else(|| corrupt("no time of its start".into()))?)?,
            idle_deadline: row.idle_deadline.map(from_micros).transpose()?,
            keep_until: row.keep_until.map(from_micros).transpose()?,
        },
        "stopping" => State::Stopping { fence: fence()?, detail: row.detail.clone().unwrap_or_default() },
        other => return Err(corrupt(format!("the state {other}"))),
    })
}

/// The columns of a state beside its name. `started_at` outlives its state, to tell which workspace was not
/// used for the longest time.
#[derive(Default)]
struct Columns {
    detail: Option<String>,
    fence: Option<i64>,
    started_at: Option<i64>,
    idle_deadline: Option<i64>,
    keep_until: Option<i64>,
}

impl Columns {
    fn of(life: &Life) -> Result<Self, StoreError> {
        Ok(match &life.state {
            State::Stopped { detail } => Self { detail: detail.clone(), ..Self::default() },
            State::Waiting => Self::default(),
            State::Starting { fence } => Self { fence: Some(number("fence", *fence)?), ..Self::default() },
            State::Running { fence, started_at, idle_deadline, keep_until } => Self {
                detail: None,
                fence: Some(number("fence", *fence)?),
                started_at: Some(to_micros(*started_at)),
                idle_deadline: idle_deadline.map(to_micros),
                keep_until: keep_until.map(to_micros),
            },
            State::Stopping { fence, detail } => {
                Self { detail: Some(detail.clone()), fence: Some(number("fence", *fence)?), ..Self::default() }
            }
        })
    }
}

fn state_name(state: WorkspaceState) -> &'static str {
    match state {
        WorkspaceState::Stopped => "stopped",
        WorkspaceState::Waiting => "waiting",
        WorkspaceState::Starting => "starting",
        WorkspaceState::Running => "running",
        WorkspaceState::Stopping => "stopping",
    }
}

fn number(what: &'static str, number: u64) -> Result<i64, StoreError> {
    i64::try_from(number).map_err(|_| StoreError::Corrupt { what, reason: format!("{number} is too large") })
}

fn corrupt(reason: String) -> StoreError {
    StoreError::Corrupt { what: "workspace", reason }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlad::api::NewUser;

    struct Fixture {
        store: Store,
        user: i64,
        _folder: tempfile::TempDir,
    }

    async fn fixture() -> Fixture {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("gateway.db")).await.unwrap();
        let user = store.add_user(&NewUser { name: "alice".into(), role: None, uid: None }).await.unwrap().id;
        Fixture { store, user, _folder: folder }
    }

    fn new(user_id: i64, name: &str, second: i64) -> NewWorkspace {
        NewWorkspace {
            user_id,
            name: name.into(),
            image: "base".into(),
            need: Need::Profile("1g.5gb".into()),
            created_at: at(second),
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn to(before: &WorkspaceRecord, life: Life) -> WorkspaceRecord {
        WorkspaceRecord { life, ..before.clone() }
    }

    #[tokio::test]
    async fn every_state_reads_back_as_it_was_written() {
        let Fixture { store, user, _folder } = fixture().await;
        let mut record = store.add_workspace(&new(user, "default", 1), 8).await.unwrap();
        assert_eq!((record.workload(), record.user.as_str()), ("w-1-0".to_owned(), "alice"));
        let begun = record.life.begin().unwrap();
        let starting = begun.granted(7).unwrap();
        let running = starting.started(at(3)).unwrap();
        let idle = running.idle(Some(at(4))).unwrap();
        let kept = idle.keep(at(5)).unwrap();
        let stopping = kept.stop("because").unwrap();
        let stopped = stopping.stopped().unwrap();
        for life in [begun, starting, running, idle, kept, stopping, stopped] {
            let after = WorkspaceRecord { image: "torch".into(), project: Some("vision".into()), ..to(&record, life) };
            store.save_workspace(&record, &after).await.unwrap();
            assert_eq!(store.workspace(user, "default").await.unwrap().as_ref(), Some(&after));
            assert_eq!(store.workspace_by_id(record.id).await.unwrap().as_ref(), Some(&after));
            assert_eq!(store.active_workspaces().await.unwrap().len(), usize::from(after.life.active()));
            record = after;
        }
        assert_eq!(record.workload(), "w-1-1");
    }

    #[tokio::test]
    async fn of_two_transitions_from_one_state_one_fails() {
        let Fixture { store, user, _folder } = fixture().await;
        let record = store.add_workspace(&new(user, "default", 1), 8).await.unwrap();
        let begun = to(&record, record.life.begin().unwrap());
        store.save_workspace(&record, &begun).await.unwrap();
        let again = store.save_workspace(&record, &begun).await.unwrap_err();
        assert!(matches!(again, StoreError::Conflict(_)), "{again}");
        // The same state of an earlier generation is another one.
        let stopped = to(&begun, begun.life.give_up(None).unwrap());
        store.save_workspace(&begun, &stopped).await.unwrap();
        let late = store.save_workspace(&record, &begun).await.unwrap_err();
        assert!(matches!(late, StoreError::Conflict(_)), "{late}");
        assert_eq!(store.workspace_by_id(record.id).await.unwrap(), Some(stopped));
    }

    #[tokio::test]
    async fn the_oldest_stopped_one_makes_room_and_numbers_are_not_given_twice() {
        let Fixture { store, user, _folder } = fixture().await;
        let first = store.add_workspace(&new(user, "first", 1), 2).await.unwrap();
        let second = store.add_workspace(&new(user, "second", 2), 2).await.unwrap();
        assert_eq!(store.add_workspace(&new(user, "first", 9), 2).await.unwrap(), first);
        // The first is used after the second was made.
        let waiting = to(&first, first.life.begin().unwrap());
        let starting = to(&first, waiting.life.granted(1).unwrap());
        let running = to(&first, starting.life.started(at(5)).unwrap());
        let stopping = to(&first, running.life.stop("done").unwrap());
        let stopped = to(&first, stopping.life.stopped().unwrap());
        let steps = [first, waiting, starting, running, stopping, stopped];
        for pair in steps.windows(2) {
            store.save_workspace(&pair[0], &pair[1]).await.unwrap();
        }
        let third = store.add_workspace(&new(user, "third", 6), 2).await.unwrap();
        let names: Vec<String> =
            store.workspaces(Some("alice")).await.unwrap().into_iter().map(|record| record.name).collect();
        assert_eq!(names, ["first", "third"]);
        assert!(third.id > second.id);
        assert!(store.workspace_by_id(second.id).await.unwrap().is_none());
        assert!(store.workspaces(Some("bob")).await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_user_goes_with_their_stopped_workspaces_and_not_with_others() {
        let Fixture { store, user, _folder } = fixture().await;
        let record = store.add_workspace(&new(user, "default", 1), 8).await.unwrap();
        let begun = to(&record, record.life.begin().unwrap());
        store.save_workspace(&record, &begun).await.unwrap();
        assert!(store.remove_user(user).await.is_err());
        let stopped = to(&begun, begun.life.give_up(None).unwrap());
        store.save_workspace(&begun, &stopped).await.unwrap();
        store.remove_user(user).await.unwrap();
        assert!(store.workspaces(None).await.unwrap().is_empty());
    }
}
