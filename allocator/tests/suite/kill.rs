//! The program is killed while many ask it for things, again and again.

use crate::{
    ask,
    host::{Host, Running},
    machine::Machine,
    until,
};
use mlad_allocator::{Allocate, AllocatorError, LeaseState, service::HttpAllocator};
use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{sync::Notify, time::timeout};

/// Far more than anything here takes.
const BOUND: Duration = Duration::from_secs(120);
const USERS: usize = 8;
const ROUNDS: usize = 12;
const NEEDS: [&str; 6] = ["1g.5gb", "2g.10gb", "3g.20gb", "1g.5gb", "7g.40gb", "cpu"];

/// What was answered, and so must stand.
#[derive(Default)]
struct Answers {
    /// Leases by workload: fence and UUIDs.
    granted: BTreeMap<String, (u64, Vec<String>)>,
    released: Vec<String>,
    /// Every fence ever answered; none twice.
    fences: BTreeMap<u64, String>,
}

/// One person who takes a slice, renews it, gives it back, takes another, until the program is gone.
struct Person {
    number: usize,
    /// How many workloads this person has had.
    had: usize,
    client: HttpAllocator,
    answers: Arc<Mutex<Answers>>,
    answered: Arc<AtomicUsize>,
    news: Arc<Notify>,
}

impl Person {
    /// Lives until the program is gone.
    async fn live(&mut self) {
        while self.turn().await.is_ok() {}
    }

    async fn turn(&mut self) -> Result<(), AllocatorError> {
        let workload = format!("w-{}-{}", self.number, self.had);
        let need = NEEDS[(self.number + self.had * 5) % NEEDS.len()];
        let mut state = match self.client.request(&ask(&workload, &format!("user{}", self.number), need)).await {
            // Given back, and the answer was lost.
            Err(AllocatorError::Ended(_)) => {
                self.had += 1;
                return Ok(());
            }
            state => state?,
        };
        self.count();
        let wait = async {
            let mut seen = 0;
            while matches!(state, LeaseState::Waiting(_)) {
                seen = self.client.changed(seen).await?;
                state = self.client.state(&workload).await?;
            }
            Ok::<_, AllocatorError>(())
        };
        timeout(BOUND, wait).await.expect("it waits for ever")?;
        let LeaseState::Granted(lease) = state else { panic!("{workload}: {state:?}") };
        {
            let mut answers = self.answers.lock().unwrap();
            let before = answers.fences.insert(lease.fence, workload.clone());
            assert!(before.is_none_or(|before| before == workload), "a fence is given twice");
            answers.granted.insert(workload.clone(), (lease.fence, lease.uuids.clone()));
        }
        self.count();
        self.client.renew(&workload, lease.fence).await?;
        self.answers.lock().unwrap().granted.remove(&workload);
        self.client.release(&workload).await?;
        self.answers.lock().unwrap().released.push(workload);
        self.count();
        self.had += 1;
        Ok(())
    }

    fn count(&self) {
        self.answered.fetch_add(1, Ordering::SeqCst);
        self.news.notify_one();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_again_and_again() {
    let machine = Machine::new("A100-40GB", 2);
    let answers = Arc::new(Mutex::new(Answers::default()));
    let mut had = [0; USERS];
    for round in 0..ROUNDS {
        let running = Host::Unix.start(&machine).await;
        let promised = promises(&answers);
        check(running.allocator(), &machine, round, &promised).await;
        let (answered, news) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
        let Running::Program(program) = &running else { unreachable!() };
        let people: Vec<_> = (0..USERS)
            .map(|number| {
                let mut person = Person {
                    number,
                    had: had[number],
                    client: HttpAllocator::new(&program.url, None).unwrap(),
                    answers: Arc::clone(&answers),
                    answered: Arc::clone(&answered),
                    news: Arc::clone(&news),
                };
                tokio::spawn(async move {
                    person.live().await;
                    (person.number, person.had)
                })
            })
            .collect();
        // Each time at another moment of what they are doing.
        while answered.load(Ordering::SeqCst) < 5 + round * 7 {
            timeout(BOUND, news.notified()).await.expect("nobody is answered any more");
        }
        drop(running);
        for person in people {
            let (number, turns) = timeout(BOUND, person).await.expect("a call has no end").unwrap();
            had[number] = turns;
        }
    }
    let running = Host::Unix.start(&machine).await;
    let promised = promises(&answers);
    check(running.allocator(), &machine, ROUNDS, &promised).await;
    // What was left half-made is set right, in its own time.
    until(running.allocator(), async || {
        let state = machine.state();
        state.gpus.iter().flat_map(|gpu| &gpu.instances).all(|instance| instance.compute.len() == 1).then_some(())
    })
    .await;
    running.stop().await;
}

type Promises = (BTreeMap<String, (u64, Vec<String>)>, Vec<String>, u64);

fn promises(answers: &Mutex<Answers>) -> Promises {
    let answers = answers.lock().unwrap();
    (answers.granted.clone(), answers.released.clone(), answers.fences.keys().next_back().copied().unwrap_or(0))
}

/// What was answered before the kill is so after it, and nothing has two holders.
async fn check(allocator: &dyn Allocate, machine: &Machine, round: usize, (granted, released, greatest): &Promises) {
    for (workload, (fence, uuids)) in granted {
        let lease = allocator.renew(workload, *fence).await.unwrap();
        assert_eq!(lease.uuids, *uuids, "{workload}");
    }
    for workload in released {
        assert!(matches!(allocator.state(workload).await.unwrap(), LeaseState::Ended { .. }), "{workload}");
    }
    let leases = allocator.leases().await.unwrap();
    let there: HashMap<String, u32> = machine.slices().into_iter().map(|(gpu, uuid)| (uuid, gpu)).collect();
    let mut holders: HashMap<&String, &String> = HashMap::new();
    for lease in &leases {
        for uuid in &lease.uuids {
            assert_eq!(there.get(uuid), lease.slices.first().map(|slice| &slice.gpu_index), "{lease:?}");
            assert_eq!(holders.insert(uuid, &lease.workload), None, "{uuid} has two holders");
        }
    }
    let probe = format!("probe-{round}");
    let LeaseState::Granted(lease) = allocator.request(&ask(&probe, "probe", "cpu")).await.unwrap() else {
        panic!("what needs no slice waits");
    };
    assert!(lease.fence > *greatest, "fences grow");
    allocator.release(&probe).await.unwrap();
}
