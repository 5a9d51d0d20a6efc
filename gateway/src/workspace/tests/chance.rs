//! Whatever happens, in whatever order: what must never be never is, and in the end nothing is left over.

use super::{Bench, eventually, wish, wish_for};
use crate::workspace::{Attached, Entering, Progress};
use mlad::api::WorkspaceState;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use std::time::Duration;

const USERS: [&str; 4] = ["alice", "bob", "carol", "dave"];

/// People who do what people do.
#[derive(Default)]
struct People {
    entering: Vec<Entering>,
    attached: Vec<Attached>,
}

impl People {
    async fn act(&mut self, bench: &Bench, random: &mut StdRng) {
        let user = USERS[random.random_range(0..USERS.len())];
        match random.random_range(0..14) {
            0..4 => {
                let wish = match random.random_range(0..3) {
                    0 => wish_for("default", "torch", "2g.10gb"),
                    _ => wish("default"),
                };
                self.entering.extend(bench.enter(user, wish).await.ok());
            }
            4 => drop(self.entering.pop()),
            5..7 if !self.attached.is_empty() => {
                let at = random.random_range(0..self.attached.len());
                drop(self.attached.swap_remove(at));
            }
            7 => drop(bench.workspaces.extend(user, "default", 5).await),
            8 => bench.world.set_engine(false),
            9 | 10 => bench.world.set_engine(true),
            11 => bench.world.clock().advance(Duration::from_secs(random.random_range(1..400))),
            12 => {
                let workload = bench.world.lock().leases.keys().next().cloned();
                if let Some(workload) = workload {
                    bench.world.revoke(&workload, "by chance");
                }
            }
            _ => {
                let name = bench.world.lock().containers.keys().next().cloned();
                if let Some(name) = name {
                    bench.world.end_container(&name, 1, false);
                }
            }
        }
        self.look(random).await;
    }

    /// Those who wait see how far it is.
    async fn look(&mut self, random: &mut StdRng) {
        for _ in 0..random.random_range(0..8) {
            tokio::task::yield_now().await;
        }
        let mut waiting = Vec::new();
        for mut entering in self.entering.drain(..) {
            match tokio::time::timeout(Duration::from_millis(1), entering.next()).await {
                Ok(Ok(Progress::Ready(attached))) => self.attached.push(attached),
                Ok(Err(_)) => {}
                Ok(Ok(_)) | Err(_) => waiting.push(entering),
            }
        }
        self.entering = waiting;
    }
}

#[tokio::test]
async fn whatever_happens_no_slice_has_two_holders_and_nothing_is_left_over() {
    for seed in 0..12 {
        let mut random = StdRng::seed_from_u64(seed);
        let mut bench = Bench::new(2).await;
        let mut people = People::default();
        for _ in 0..60 {
            if random.random_range(0..20) == 0 {
                people = People::default();
                let crash_after = if random.random() { random.random_range(1..30) } else { -1 };
                bench = bench.crash_to(crash_after).await;
            }
            tokio::select! {
                () = people.act(&bench, &mut random) => {}
                () = bench.view.crashed() => {
                    people = People::default();
                    bench = bench.crash().await;
                }
            }
            let state = bench.world.lock();
            assert_eq!(state.violations, Vec::<String>::new(), "seed {seed}");
        }
        drop(people);
        bench = bench.crash().await;
        bench.world.set_engine(true);
        // Everybody has left: in time, everything ends.
        eventually(|| async {
            bench.world.clock().advance(Duration::from_secs(60));
            let workspaces = bench.workspaces.list(None).await.unwrap();
            workspaces.iter().all(|workspace| workspace.state == WorkspaceState::Stopped).then_some(())
        })
        .await;
        bench.assert_clean().await;
    }
}
