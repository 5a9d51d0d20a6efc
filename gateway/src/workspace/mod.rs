//! The controller of workspaces: from a wish to a running container, and back when nobody is left.
//!
//! What is wanted is in the database, what there is at the runtime and the allocator; an actor for every
//! workspace that is not at rest compares and acts ([`state`] draws the states). A login joins by
//! [`Workspaces::enter`]: however many there are, one start serves them all, and the last who leaves before
//! it is done gives the place in the queue back. While somebody is attached the workspace stays; when nobody
//! is, it ends at its idle deadline, and its lease is given back when its container is proven gone.
//!
//! Not here: what a person sees while they wait ([`crate::login`]), and what goes over a connection
//! ([`crate::ssh`]).

mod actor;
mod clock;
mod controller;
mod entering;
mod error;
mod live;
mod renewal;
mod spec;
mod state;
#[cfg(test)]
pub(crate) mod tests;

pub use clock::{Clock, SystemClock};
pub use entering::{Attached, Entering, Progress};
pub use error::WorkspaceError;
pub use live::Notice;
pub use spec::slice_environment;
pub use state::{Life, State, TransitionError, parse_workload_name, workload_name};

use crate::{
    config::Config,
    image::Catalog,
    quota::project_in_the_way,
    runtime::{Runtime, WorkloadObserver},
    store::{NewWorkspace, Store, StoreError, UserRecord, WorkspaceRecord},
};
use actor::image_error;
pub(crate) use clock::later;
use controller::{Controller, Parts};
use live::{Choice, Live};
use mlad::api::{GpuMap, Image, Lease, Need, Project, Quota, Wait, Workspace};
use mlad_allocator::{Allocate, Resolved};
use std::{sync::Arc, time::Duration};
use tokio_util::sync::DropGuard;

/// Longest name of a workspace, in bytes.
const MAX_NAME: usize = 32;
/// How long [`Workspaces::stop`] waits for the end.
const STOP_PATIENCE: Duration = Duration::from_secs(30);

/// The controller. Clones are the same one; when the last is dropped, its tasks end.
#[derive(Clone)]
pub struct Workspaces {
    controller: Arc<Controller>,
    _guard: Arc<DropGuard>,
}

/// What a login asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wish {
    /// Name of the workspace; `default` if the login named none.
    pub name: String,
    /// Image by catalog name; what it was made of before, or the default, if absent.
    pub image: Option<String>,
    /// Slice; what it had before, or the default, if absent.
    pub need: Option<Need>,
    /// The project it is to count for, or `none`; what it counted for before, or the user's default, if absent.
    pub project: Option<String>,
}

/// What a login gets if it does not ask for anything else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Preset {
    /// The image; none if nothing says which.
    pub image: Option<String>,
    /// The slice; none if nothing says which.
    pub need: Option<Need>,
}

impl Workspaces {
    /// Takes over what runs, ends what nobody wants, and begins to work. Does not need the container engine
    /// or the allocator to answer yet.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub async fn start(
        config: Arc<Config>,
        store: Store,
        allocator: Arc<dyn Allocate>,
        runtime: Arc<dyn Runtime>,
        catalog: Arc<Catalog>,
        observer: Arc<dyn WorkloadObserver>,
    ) -> Result<Self, WorkspaceError> {
        let clock = Arc::new(SystemClock);
        Self::start_with(Parts { config, store, allocator, runtime, catalog, observer, clock }).await
    }

    async fn start_with(parts: Parts) -> Result<Self, WorkspaceError> {
        let controller = Controller::start(parts).await?;
        let _guard = Arc::new(controller.drop_guard());
        Ok(Self { controller, _guard })
    }

    /// What this login would get: what it wishes, else what the workspace was made of before, else the
    /// defaults.
    ///
    /// # Errors
    /// When the name is none or the database fails.
    pub async fn preset(&self, user: &UserRecord, wish: &Wish) -> Result<Preset, WorkspaceError> {
        check_name(&wish.name)?;
        let record = self.controller.store.workspace(user.id, &wish.name).await?;
        Ok(self.preset_of(user, wish, record.as_ref()))
    }

    fn preset_of(&self, user: &UserRecord, wish: &Wish, record: Option<&WorkspaceRecord>) -> Preset {
        let defaults = &self.controller.config.workspace;
        let image = wish.image.clone().or_else(|| record.map(|record| record.image.clone()));
        let need = wish.need.clone().or_else(|| record.map(|record| record.need.clone()));
        Preset {
            image: image.or_else(|| defaults.default_image.clone()),
            need: need.or_else(|| user.quota.default_need.clone()).or_else(|| defaults.default_need.clone()),
        }
    }

    /// Enters a workspace: attaches to it if it runs, else joins its start, else starts it.
    ///
    /// # Errors
    /// At once what can never be: a bad name, an unknown image, an impossible slice, one that runs and is
    /// made of something else.
    pub async fn enter(&self, user: &UserRecord, wish: Wish) -> Result<Entering, WorkspaceError> {
        check_name(&wish.name)?;
        let record = self.controller.store.workspace(user.id, &wish.name).await?;
        let preset = self.preset_of(user, &wish, record.as_ref());
        let project = self.project(user, &wish, record.as_ref()).await?;
        let mut choice = Choice {
            image_named: wish.image.is_some(),
            image: preset.image.ok_or(WorkspaceError::NoImage)?,
            need_named: wish.need.is_some(),
            need: preset.need.ok_or(WorkspaceError::NoNeed)?,
            project,
            project_named: wish.project.is_some(),
            profile: None,
        };
        match record.as_ref().filter(|record| self.controller.live(record.id).is_some_and(|live| live.runs())) {
            // Nothing is to be asked of anybody to enter what runs, unless it may be something else.
            Some(record) if choice.need == record.need => {}
            Some(_) => choice.profile = Some(self.resolve(&choice.need).await?.profile),
            None => choice.profile = Some(self.check(user, &choice).await?),
        }
        let last_end = record.as_ref().and_then(|record| match &record.life.state {
            // What somebody did themselves they know.
            State::Stopped { detail } => detail.clone().filter(|why| *why != stopped_by(&user.name)),
            _ => None,
        });
        let record = match record {
            Some(record) => record,
            None => self.add(user, &wish.name, &choice).await?,
        };
        let joined = self.controller.join(record, user, &choice)?;
        Ok(Entering::new(joined, Arc::clone(&self.controller.runtime), last_end))
    }

    /// What it is to count for: a project that the user is a member of, or none.
    async fn project(
        &self,
        user: &UserRecord,
        wish: &Wish,
        record: Option<&WorkspaceRecord>,
    ) -> Result<Option<String>, WorkspaceError> {
        let store = &self.controller.store;
        match &wish.project {
            Some(name) if name == Project::NONE => return Ok(None),
            Some(name) if store.is_member(user.id, name).await? => return Ok(Some(name.clone())),
            Some(name) => return Err(WorkspaceError::Project(printable(name))),
            None => {}
        }
        match record.and_then(|record| record.project.as_ref()) {
            Some(before) if store.is_member(user.id, before).await? => Ok(Some(before.clone())),
            _ => Ok(store.default_project(user.id).await?),
        }
    }

    /// Attaches to a workspace if it runs now, whatever it is made of; none if it would have to be waited for.
    ///
    /// # Errors
    /// When the name is none or the database fails.
    pub async fn attach(&self, user: &UserRecord, name: &str) -> Result<Option<Attached>, WorkspaceError> {
        check_name(name)?;
        let record = self.controller.store.workspace(user.id, name).await?;
        let attached = record.and_then(|record| self.controller.live(record.id)?.attach());
        Ok(attached
            .map(|(presence, workspace)| Attached::new(presence, workspace, Arc::clone(&self.controller.runtime))))
    }

    /// Refuses what can never be; returns the profile the slice comes to.
    async fn check(&self, user: &UserRecord, choice: &Choice) -> Result<String, WorkspaceError> {
        let entry = self.controller.catalog.get_for(user, &choice.image).await.map_err(image_error)?;
        let resolved = self.resolve(&choice.need).await?;
        if entry.min_gpu_memory_mib > resolved.memory_mib {
            return Err(WorkspaceError::ImageNeeds {
                image: entry.name,
                needed_mib: entry.min_gpu_memory_mib,
                need: choice.need.clone(),
                has_mib: resolved.memory_mib,
            });
        }
        check_quota(&user.quota, &resolved)?;
        let Some(project) = choice.project.as_ref().filter(|_| resolved.memory_mib > 0) else {
            return Ok(resolved.profile);
        };
        match project_in_the_way(&self.controller.store, project, 1, resolved.memory_mib).await? {
            None => Ok(resolved.profile),
            Some(name) => {
                let need = &choice.need;
                Err(WorkspaceError::Quota(format!("{need} is more than the limits of the project {name} allow")))
            }
        }
    }

    async fn add(&self, user: &UserRecord, name: &str, choice: &Choice) -> Result<WorkspaceRecord, WorkspaceError> {
        let most = self.controller.config.workspace.max_per_user;
        let new = NewWorkspace {
            user_id: user.id,
            name: name.to_owned(),
            image: choice.image.clone(),
            need: choice.need.clone(),
            created_at: self.controller.clock.now(),
        };
        match self.controller.store.add_workspace(&new, most).await {
            Err(StoreError::Conflict(names)) => Err(WorkspaceError::TooMany { most, names }),
            result => Ok(result?),
        }
    }

    /// The workspaces of one user, or of all, by user and name.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list(&self, user: Option<&str>) -> Result<Vec<Workspace>, WorkspaceError> {
        let records = self.controller.store.workspaces(user).await?;
        Ok(records.iter().map(|record| self.show(record)).collect())
    }

    /// One workspace.
    ///
    /// # Errors
    /// [`WorkspaceError::NotFound`] if there is none of that name.
    pub async fn get(&self, user: &str, name: &str) -> Result<Workspace, WorkspaceError> {
        Ok(self.show(&self.find(user, name).await?))
    }

    async fn find(&self, user: &str, name: &str) -> Result<WorkspaceRecord, WorkspaceError> {
        let user = self.controller.store.user_by_name(user).await?;
        let record = self.controller.store.workspace(user.id, name).await?;
        record.ok_or_else(|| WorkspaceError::NotFound(printable(name)))
    }

    fn show(&self, record: &WorkspaceRecord) -> Workspace {
        self.controller.live(record.id).map_or_else(|| live::show(record), |live| live.show())
    }

    /// Stops a workspace; returns when it is stopped, or, if that takes long, when it is on its way. `by` is
    /// told to those who are in it.
    ///
    /// # Errors
    /// [`WorkspaceError::NotFound`] if there is none of that name.
    pub async fn stop(&self, user: &str, name: &str, by: &str) -> Result<Workspace, WorkspaceError> {
        let record = self.find(user, name).await?;
        match self.controller.live(record.id) {
            Some(live) => self.stop_live(record, Some(live), by).await,
            // It is at rest, and may have come to rest since it was read.
            None => Ok(live::show(&self.find(user, name).await?)),
        }
    }

    /// Stops the workspace whose container is `workload`, and no later one of the same workspace.
    ///
    /// # Errors
    /// [`WorkspaceError::NotFound`] if no workspace is that workload now.
    pub async fn stop_workload(&self, workload: &str, by: &str) -> Result<Workspace, WorkspaceError> {
        let unknown = || WorkspaceError::NotFound(printable(workload));
        let (id, generation) = parse_workload_name(workload).ok_or_else(unknown)?;
        let live = self.controller.live(id).ok_or_else(unknown)?;
        let record = live.record();
        if record.life.generation != generation || !record.life.active() {
            return Err(unknown());
        }
        self.stop_live(record, Some(live), by).await
    }

    async fn stop_live(
        &self,
        record: WorkspaceRecord,
        live: Option<Arc<Live>>,
        by: &str,
    ) -> Result<Workspace, WorkspaceError> {
        let Some(live) = live else { return Ok(live::show(&record)) };
        let generation = live.record().life.generation;
        live.request_stop(&stopped_by(by));
        let ended = live.until(|record| !record.life.active() || record.life.generation != generation);
        let patience = self.controller.clock.until(later(self.controller.clock.now(), STOP_PATIENCE));
        tokio::select! {
            () = ended => {}
            () = patience => {}
            () = self.controller.shutdown.cancelled() => return Err(WorkspaceError::ShuttingDown),
        }
        Ok(live.show())
    }

    /// Keeps a running workspace for at least `minutes` from now, whether or not somebody is connected; at
    /// most as long as the settings allow. What was promised before is kept.
    ///
    /// # Errors
    /// [`WorkspaceError::NotRunning`] if it does not run.
    pub async fn extend(&self, user: &str, name: &str, minutes: u64) -> Result<Workspace, WorkspaceError> {
        let record = self.find(user, name).await?;
        let not_running = || WorkspaceError::NotRunning(record.name.clone());
        let live = self.controller.live(record.id).ok_or_else(not_running)?;
        let minutes = minutes.min(self.controller.config.workspace.max_extension_minutes);
        let until = later(self.controller.clock.now(), Duration::from_secs(minutes.saturating_mul(60)));
        if !live.request_keep(until) {
            return Err(not_running());
        }
        let written = live.until(|record| match record.life.state {
            State::Running { keep_until, .. } => keep_until >= Some(until),
            _ => true,
        });
        tokio::select! {
            () = written => {}
            () = self.controller.shutdown.cancelled() => return Err(WorkspaceError::ShuttingDown),
        }
        match live.record().life.state {
            State::Running { .. } => Ok(live.show()),
            _ => Err(not_running()),
        }
    }

    /// Ends every task of this controller, in good order where that is possible in half a minute. Containers
    /// go on running and are taken over at the next start.
    pub async fn shutdown(&self) {
        self.controller.shut_down().await;
    }

    /// The images this user may use.
    ///
    /// # Errors
    /// When the database or the engine fails.
    pub async fn images(&self, user: &UserRecord) -> Result<Vec<Image>, WorkspaceError> {
        let images = self.controller.catalog.list_for(&user.name, user.role, self.controller.runtime.as_ref());
        images.await.map_err(image_error)
    }

    /// Least GPU memory an image needs, in MiB.
    ///
    /// # Errors
    /// [`WorkspaceError::Image`] when there is none of that name.
    pub async fn image_needs(&self, user: &UserRecord, image: &str) -> Result<u64, WorkspaceError> {
        let entry = self.controller.catalog.get_for(user, image).await.map_err(image_error)?;
        Ok(entry.min_gpu_memory_mib)
    }

    /// The GPUs and what is on them.
    ///
    /// # Errors
    /// When the allocator cannot be reached.
    pub async fn gpus(&self) -> Result<GpuMap, WorkspaceError> {
        Ok(self.controller.allocator.map().await?)
    }

    /// Every lease and every waiting request.
    ///
    /// # Errors
    /// When the allocator cannot be reached.
    pub async fn leases_and_waits(&self) -> Result<(Vec<Lease>, Vec<Wait>), WorkspaceError> {
        Ok((self.controller.allocator.leases().await?, self.controller.allocator.waits().await?))
    }

    /// What a need comes to.
    ///
    /// # Errors
    /// [`WorkspaceError::Impossible`] when it can never fit.
    pub async fn resolve(&self, need: &Need) -> Result<Resolved, WorkspaceError> {
        Ok(self.controller.allocator.resolve(need).await?)
    }

    /// Minutes a workspace stays when nobody is connected.
    pub fn idle_minutes(&self) -> u64 {
        self.controller.config.workspace.idle_minutes
    }

    /// The clock of this controller.
    pub(crate) fn clock(&self) -> &dyn Clock {
        self.controller.clock.as_ref()
    }
}

/// Why a workspace ended that somebody stopped.
fn stopped_by(who: &str) -> String {
    format!("stopped by {who}")
}

/// Whether a text can be the name of a workspace.
///
/// # Errors
/// [`WorkspaceError::Name`] if it cannot.
pub fn check_name(name: &str) -> Result<(), WorkspaceError> {
    let letter = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'_';
    if (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(letter) {
        Ok(())
    } else {
        Err(WorkspaceError::Name(printable(name)))
    }
}

/// What somebody wrote, short and without what a terminal would obey.
fn printable(text: &str) -> String {
    text.chars().map(|letter| if letter.is_control() { '?' } else { letter }).take(2 * MAX_NAME).collect()
}

/// Refuses what the user's quota can never allow, so that nobody waits for it.
fn check_quota(quota: &Quota, resolved: &Resolved) -> Result<(), WorkspaceError> {
    if resolved.memory_mib == 0 {
        return Ok(());
    }
    if quota.slices == Some(0) {
        return Err(WorkspaceError::Quota("your quota allows no GPU slice; `cpu` needs none".into()));
    }
    match quota.gpu_memory_mib {
        Some(most) if resolved.memory_mib > most => Err(WorkspaceError::Quota(format!(
            "your quota allows {most} MiB of GPU memory, {} has {} MiB",
            resolved.profile, resolved.memory_mib
        ))),
        _ => Ok(()),
    }
}
