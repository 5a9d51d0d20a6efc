//! What users and projects may hold, as the allocator is told it.
//!
//! The database says what administrators want; [`Quotas`] compares that with what the allocator knows, at the start,
//! after every change, and whenever the allocator was away or began anew, and tells it what differs. Not here: who
//! enforces limits (the allocator) and who sets them ([`crate::api`]).

use crate::store::{ProjectRecord, Store, StoreError, UserRecord};
use mlad_allocator::{Account, AccountName, AccountState, Allocate, AllocatorError, Limits};
use std::{collections::HashMap, sync::Arc, time::Duration};
use tokio::time::{sleep, timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Most accounts told in one call; the allocator takes some more.
const AT_ONCE: usize = 10_000;
/// First and longest pause before it is tried again after a failure.
const PAUSE: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(30));
/// It is compared again after this long without any news: a request may have told limits that were just changed.
const COMPARE_AGAIN: Duration = Duration::from_secs(600);

/// Keeps the allocator's limits those of the database, until it is shut down.
pub struct Quotas {
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Quotas {
    /// Begins. The allocator may be away: it is told when it is back.
    pub fn start(store: Store, allocator: Arc<dyn Allocate>) -> Self {
        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        let ended = stop.clone();
        tasks.spawn(async move {
            ended.run_until_cancelled(keep_told(&store, &*allocator)).await;
        });
        Self { stop, tasks }
    }

    /// Ends it; what the allocator was told stays.
    pub async fn shutdown(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

/// Why the allocator could not be told now.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Allocator(#[from] AllocatorError),
}

async fn keep_told(store: &Store, allocator: &dyn Allocate) {
    let mut changes = store.limit_changes();
    let mut pause = PAUSE.0;
    loop {
        changes.mark_unchanged();
        match tell(store, allocator).await {
            Ok(told) => {
                if told > 0 {
                    tracing::info!(told, "the allocator was told the limits of users and projects");
                }
                pause = PAUSE.0;
                tokio::select! {
                    changed = changes.changed() => if changed.is_err() { return },
                    _ = timeout(COMPARE_AGAIN, began_anew(allocator)) => {}
                }
            }
            Err(fault) => {
                tracing::warn!(error = %fault, ?pause, "the allocator cannot be told limits now; trying again");
                sleep(pause).await;
                pause = (pause * 2).min(PAUSE.1);
            }
        }
    }
}

/// Tells the allocator what differs; returns how much that was.
async fn tell(store: &Store, allocator: &dyn Allocate) -> Result<usize, Fault> {
    let (users, projects) = (store.users().await?, store.projects().await?);
    let known = allocator.accounts().await?;
    let differing = differing(&users, &projects, &known);
    for some in differing.chunks(AT_ONCE) {
        allocator.set_accounts(some).await?;
    }
    Ok(differing.len())
}

/// Returns when the allocator may have forgotten something: it could not be reached, or its versions begin anew.
async fn began_anew(allocator: &dyn Allocate) {
    let mut seen = 0;
    while let Ok(version) = allocator.changed(seen).await {
        if version < seen {
            return;
        }
        seen = version;
    }
}

/// What the allocator does not know, or otherwise. Shares are left as they are there; accounts that it alone knows
/// stay, but without limits if they are of projects: those were removed here.
fn differing(users: &[UserRecord], projects: &[ProjectRecord], known: &[AccountState]) -> Vec<Account> {
    let known: HashMap<&AccountName, &Account> =
        known.iter().map(|state| (&state.account.name, &state.account)).collect();
    let user = |user: &UserRecord| (AccountName::User(user.name.clone()), None, user_limits(user));
    let project = |project: &ProjectRecord| {
        (AccountName::Project(project.name.clone()), project.parent.clone(), project_limits(project))
    };
    let here = |name: &str| projects.iter().any(|project| project.name == name);
    let removed = known.keys().filter_map(|name| match name {
        AccountName::Project(name) if !here(name) => {
            Some((AccountName::Project(name.clone()), None, Limits::default()))
        }
        _ => None,
    });
    let wanted = users.iter().map(user).chain(projects.iter().map(project)).chain(removed);
    wanted
        .filter_map(|(name, parent, limits)| {
            let shares = match known.get(&name) {
                Some(known) if known.parent == parent && known.limits == limits => return None,
                None if parent.is_none() && limits == Limits::default() => return None,
                known => known.map_or(1, |known| known.shares),
            };
            Some(Account { name, parent, shares, limits })
        })
        .collect()
}

/// What a user may hold.
pub fn user_limits(user: &UserRecord) -> Limits {
    let quota = &user.quota;
    Limits { slices: quota.slices, gpu_memory_mib: quota.gpu_memory_mib, gpu_seconds: quota.gpu_seconds }
}

fn project_limits(project: &ProjectRecord) -> Limits {
    let limits = &project.limits;
    Limits { slices: limits.slices, gpu_memory_mib: limits.gpu_memory_mib, gpu_seconds: limits.gpu_seconds }
}

/// Whether limits could ever allow so many slices at once, of so much GPU memory together.
pub fn could_allow(limits: &Limits, slices: u32, memory_mib: u64) -> bool {
    limits.slices.is_none_or(|most| slices <= most) && limits.gpu_memory_mib.is_none_or(|most| memory_mib <= most)
}

/// The project, this one or one that it lies in, whose limits could never allow so many slices at once, of so much GPU
/// memory together; none if all could.
///
/// # Errors
/// When the database fails.
pub async fn project_in_the_way(
    store: &Store,
    project: &str,
    slices: u32,
    memory_mib: u64,
) -> Result<Option<String>, StoreError> {
    let mut chain = store.project_chain(project).await?.into_iter();
    let first = chain.find(|project| !could_allow(&project_limits(project), slices, memory_mib));
    Ok(first.map(|project| project.name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{self, CrashPoint, FakeAllocator, World};
    use mlad::api::{NewProject, NewUser, ProjectLimits, Quota};

    fn state(account: Account) -> AccountState {
        AccountState {
            account,
            slices: 0,
            gpu_memory_mib: 0,
            gpu_seconds: 0,
            committed_gpu_seconds: 0,
            faded_gpu_seconds: 0.0,
        }
    }

    fn limits(slices: u32) -> Limits {
        Limits { slices: Some(slices), ..Limits::default() }
    }

    #[tokio::test]
    async fn the_allocator_is_told_at_the_start_at_a_change_and_when_it_is_back() {
        let folder = tempfile::tempdir().unwrap();
        let store = testing::store(folder.path()).await;
        let alice = store.add_user(&NewUser { name: "alice".into(), role: None, uid: None }).await.unwrap();
        store.set_user_quota(alice.id, &Quota { slices: Some(2), ..Quota::default() }).await.unwrap();
        let world = World::new(1);
        let quotas = Quotas::start(store.clone(), Arc::new(FakeAllocator::new(&world, &CrashPoint::never())));
        let user = AccountName::User("alice".into());
        let project = AccountName::Project("vision".into());
        world.until("the user's limit is known", |world| world.limits_of(&user) == Some(limits(2))).await;

        store.add_project(&NewProject { name: "vision".into(), parent: None }).await.unwrap();
        world.set_allocator(false);
        let few = ProjectLimits { slices: Some(1), ..ProjectLimits::default() };
        store.set_project_limits("vision", &few).await.unwrap();
        world.set_allocator(true);
        world.until("the project's limit is known", |world| world.limits_of(&project) == Some(limits(1))).await;

        // It comes back with nothing of what it was told.
        let before = world.refused();
        world.set_allocator(false);
        world.until("it is missed", |world| world.refused() > before).await;
        world.forget_accounts();
        world.set_allocator(true);
        world.until("all is known again", |world| world.limits_of(&project) == Some(limits(1))).await;
        store.remove_project("vision").await.unwrap();
        world.until("it is without limits", |world| world.limits_of(&project) == Some(Limits::default())).await;
        quotas.shutdown().await;
    }

    #[test]
    fn shares_that_were_set_at_the_allocator_stay_and_what_agrees_is_not_told() {
        let name = AccountName::Project("vision".into());
        let known = |limits| [state(Account { name: name.clone(), parent: None, shares: 7, limits })];
        let project = ProjectRecord {
            id: 1,
            name: "vision".into(),
            parent: None,
            limits: ProjectLimits { slices: Some(3), ..ProjectLimits::default() },
            created_at: jiff::Timestamp::UNIX_EPOCH,
        };
        let told = differing(&[], std::slice::from_ref(&project), &known(limits(1)));
        assert_eq!(told, [Account { name: name.clone(), parent: None, shares: 7, limits: limits(3) }]);
        assert!(differing(&[], &[project], &known(limits(3))).is_empty());
    }
}
