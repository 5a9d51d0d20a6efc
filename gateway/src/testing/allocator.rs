//! One gateway's view of the allocator: a machine with equal slices, first come first served.

use super::{CrashPoint, World};
use async_trait::async_trait;
use jiff::Timestamp;
use mlad::api::{GpuMap, Lease, Need, NewReservation, Reservation, Wait};
use mlad_allocator::{Account, AccountState, Allocate, AllocatorError, LeaseRequest, LeaseState, Resolved};

/// The allocator as one gateway sees it.
pub(crate) struct FakeAllocator {
    world: World,
    crash: CrashPoint,
}

impl FakeAllocator {
    pub(crate) fn new(world: &World, crash: &CrashPoint) -> Self {
        Self { world: world.clone(), crash: crash.clone() }
    }

    async fn call<T>(&self, effect: impl FnOnce(&World) -> Result<T, AllocatorError>) -> Result<T, AllocatorError> {
        self.crash.pass().await;
        let away = self.world.lock().allocator_away;
        let result = if away {
            self.world.lock().refused += 1;
            Err(AllocatorError::Unreachable { url: "http://world".into(), reason: "it is away".into() })
        } else {
            effect(&self.world)
        };
        self.crash.pass().await;
        result
    }
}

#[async_trait]
impl Allocate for FakeAllocator {
    async fn resolve(&self, need: &Need) -> Result<Resolved, AllocatorError> {
        self.call(|_| match need {
            Need::Cpu => Ok(Resolved { profile: "cpu".into(), memory_mib: 0 }),
            Need::Profile(name) if name == "1g.5gb" => Ok(Resolved { profile: name.clone(), memory_mib: 4864 }),
            Need::MemoryMib(mib) if *mib <= 4864 => Ok(Resolved { profile: "1g.5gb".into(), memory_mib: 4864 }),
            other => Err(AllocatorError::Impossible(format!("no GPU here has {other}; 1g.5gb would fit"))),
        })
        .await
    }

    async fn request(&self, request: &LeaseRequest) -> Result<LeaseState, AllocatorError> {
        self.call(|world| {
            let mut inner = world.lock();
            match inner.state_of(&request.workload) {
                Some(LeaseState::Ended { .. }) => return Err(AllocatorError::Ended(request.workload.clone())),
                Some(LeaseState::Granted(lease)) => return Ok(LeaseState::Granted(lease)),
                Some(LeaseState::Waiting(_)) => {
                    let mine = inner.queue.iter_mut().find(|waiting| waiting.workload == request.workload);
                    mine.unwrap().limits = request.limits;
                }
                None => match &request.reservation {
                    Some(name) if !inner.reservations.iter().any(|known| known.name == *name) => {
                        return Err(AllocatorError::Reservation(format!("there is no reservation {name}")));
                    }
                    _ => inner.queue.push(request.clone()),
                },
            }
            inner.grant();
            let state = inner.state_of(&request.workload).unwrap();
            drop(inner);
            world.bump();
            Ok(state)
        })
        .await
    }

    async fn state(&self, workload: &str) -> Result<LeaseState, AllocatorError> {
        self.call(|world| world.lock().state_of(workload).ok_or_else(|| AllocatorError::Unknown(workload.to_owned())))
            .await
    }

    async fn renew(&self, workload: &str, fence: u64) -> Result<Lease, AllocatorError> {
        self.call(|world| {
            let mut inner = world.lock();
            let Some(lease) = inner.leases.get_mut(workload) else {
                return Err(AllocatorError::Ended(workload.to_owned()));
            };
            if lease.fence != fence {
                return Err(AllocatorError::Fence(workload.to_owned()));
            }
            let lasts = lease.expires_at.duration_since(lease.granted_at);
            lease.expires_at = Timestamp::now() + lasts;
            Ok(lease.clone())
        })
        .await
    }

    async fn release(&self, workload: &str) -> Result<(), AllocatorError> {
        self.call(|world| {
            let mut inner = world.lock();
            if inner.is_alive(workload) {
                inner.violation(format!("the lease of {workload} was given back while it runs"));
            }
            let known = inner.state_of(workload);
            if matches!(known, Some(LeaseState::Granted(_) | LeaseState::Waiting(_))) {
                inner.leases.remove(workload);
                inner.queue.retain(|request| request.workload != workload);
                inner.ended.insert(workload.to_owned());
                inner.grant();
                drop(inner);
                world.bump();
            }
            Ok(())
        })
        .await
    }

    async fn revoke(&self, workload: &str, _: &str, free: bool) -> Result<(), AllocatorError> {
        self.call(|world| {
            let mut inner = world.lock();
            if free && inner.is_alive(workload) {
                inner.violation(format!("the slice of {workload} was freed while it runs"));
            }
            inner.leases.remove(workload);
            inner.queue.retain(|request| request.workload != workload);
            inner.ended.insert(workload.to_owned());
            inner.grant();
            drop(inner);
            world.bump();
            Ok(())
        })
        .await
    }

    async fn leases(&self) -> Result<Vec<Lease>, AllocatorError> {
        let listed = self.call(|world| Ok(world.lock().leases.values().cloned().collect())).await;
        if listed.is_err() {
            self.world.lock().refused_listings += 1;
        }
        listed
    }

    async fn waits(&self) -> Result<Vec<Wait>, AllocatorError> {
        self.call(|world| Ok(world.lock().waits())).await
    }

    async fn map(&self) -> Result<GpuMap, AllocatorError> {
        self.call(|_| Ok(GpuMap { gpus: Vec::new(), as_of: Timestamp::now(), late: None })).await
    }

    async fn nodes(&self) -> Result<Vec<mlad::api::NodeInfo>, AllocatorError> {
        Ok(Vec::new())
    }

    async fn forget_node(&self, node: &str) -> Result<(), AllocatorError> {
        Err(AllocatorError::Unknown(node.to_owned()))
    }

    async fn trust_gpu(&self, gpu: &str) -> Result<(), AllocatorError> {
        Err(AllocatorError::Unknown(gpu.to_owned()))
    }

    async fn past(&self, at: jiff::Timestamp) -> Result<mlad::api::Past, AllocatorError> {
        Ok(mlad::api::Past { at, incomplete: false, leases: Vec::new() })
    }

    async fn usage(
        &self,
        from: jiff::civil::Date,
        to: jiff::civil::Date,
    ) -> Result<mlad::api::UsageList, AllocatorError> {
        Ok(mlad::api::UsageList { from, to, kept_since: from, usage: Vec::new() })
    }

    async fn set_accounts(&self, accounts: &[Account]) -> Result<(), AllocatorError> {
        self.call(|world| {
            let mut inner = world.lock();
            for account in accounts {
                inner.accounts.retain(|known| known.name != account.name);
                inner.accounts.push(account.clone());
            }
            inner.grant();
            drop(inner);
            world.bump();
            Ok(())
        })
        .await
    }

    async fn accounts(&self) -> Result<Vec<AccountState>, AllocatorError> {
        self.call(|world| Ok(world.lock().account_states())).await
    }

    async fn reserve(&self, new: &NewReservation) -> Result<Reservation, AllocatorError> {
        let made = Reservation {
            name: new.name.clone(),
            need: new.need.clone(),
            slices: new.slices,
            from: new.from.unwrap_or_else(Timestamp::now),
            until: new.until,
            users: new.users.clone(),
            projects: new.projects.clone(),
            places: Vec::new(),
            active: false,
            in_use: 0,
            trouble: None,
            made_at: Timestamp::now(),
        };
        self.call(|world| {
            world.lock().reservations.push(made.clone());
            world.bump();
            Ok(made)
        })
        .await
    }

    async fn cancel_reservation(&self, name: &str) -> Result<(), AllocatorError> {
        self.call(|world| {
            let mut inner = world.lock();
            inner.reservations.retain(|known| known.name != name);
            let of_it = |request: &LeaseRequest| request.reservation.as_deref() == Some(name);
            let over: Vec<String> = inner.queue.iter().filter(|it| of_it(it)).map(|it| it.workload.clone()).collect();
            inner.queue.retain(|request| !of_it(request));
            inner.ended.extend(over);
            drop(inner);
            world.bump();
            Ok(())
        })
        .await
    }

    async fn reservations(&self) -> Result<Vec<Reservation>, AllocatorError> {
        self.call(|world| Ok(world.lock().reservations.clone())).await
    }

    async fn changed(&self, seen: u64) -> Result<u64, AllocatorError> {
        let mut version = self.world.version.subscribe();
        let now = *version.wait_for(|version| *version != seen).await.unwrap();
        // The news are on their way; whether the allocator answers is asked as for any other call.
        self.call(|_| Ok(now)).await
    }
}
