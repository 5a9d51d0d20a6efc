use super::{
    super::{
        ledger::Ledger,
        nodes::Joining,
        record::{Now, Write},
        store::Loaded,
    },
    ledger::World,
};
use crate::{
    AllocatorError, LeaseRequest, LeaseState,
    node::{
        DriverError, Listed, Order, Report,
        fake::{Fails, FakeGpu},
    },
};
use mlad::api::{Lease, NodeState};
use std::time::Duration;

const LEASE: u64 = 120;
/// After so long without a renewal a node of that lease is lost.
const GRACE: u64 = LEASE + LEASE / 10 + 60 + 3;

/// A ledger with its own A100, and other machines with one each.
struct Cluster {
    world: World,
    far: Vec<Far>,
}

struct Far {
    name: String,
    boot: String,
    gpu: FakeGpu,
    fence: u64,
}

impl Cluster {
    fn new(far: &[&str]) -> Self {
        let mut cluster = Self { world: World::new(&["A100-40GB"]), far: Vec::new() };
        for name in far {
            let mut gpu = FakeGpu::new(0, "A100-40GB");
            gpu.reading.uuid = format!("GPU-of-{name}");
            cluster.far.push(Far { name: (*name).to_owned(), boot: "boot-1".to_owned(), gpu, fence: 0 });
        }
        (0..far.len()).for_each(|at| cluster.join(at, true).unwrap());
        cluster
    }

    fn join(&mut self, at: usize, stopped: bool) -> Result<(), super::super::Unwelcome> {
        let Far { name, boot, .. } = &self.far[at];
        let machine = format!("machine-{name}");
        let joining = Joining { node: name.clone(), machine, boot: boot.clone(), stopped };
        self.far[at].fence = self.world.ledger.join(&joining, self.world.now)?;
        let listed = Listed { index: 0, uuid: Ok(self.far[at].gpu.reading.uuid.clone()) };
        self.report(at, Report::Listed(vec![listed]));
        self.report(at, self.far[at].gpu.read());
        Ok(())
    }

    fn report(&mut self, at: usize, report: Report) {
        let Far { name, fence, .. } = &self.far[at];
        let (name, fence) = (name.clone(), *fence);
        self.world.ledger.report_from(&name, fence, report, self.world.now);
        self.settle();
    }

    /// Schedules, and does what is ordered of machines that are heard.
    fn settle(&mut self) {
        let orders = self.orders();
        for (gpu, order) in orders {
            let Some(at) = self.far.iter().position(|far| far.gpu.reading.uuid == gpu) else {
                let own = &mut self.world.gpus[0];
                let report = match order {
                    Order::Change(change) => own.change(&change, Fails::Never),
                    Order::Read | Order::Clear(_) => own.read(),
                };
                self.world.ledger.report(report, self.world.now);
                self.settle();
                continue;
            };
            let report = match order {
                Order::Read => self.far[at].gpu.read(),
                Order::Change(change) => self.far[at].gpu.change(&change, Fails::Never),
                Order::Clear(_) => unreachable!(),
            };
            self.report(at, report);
        }
        self.world.gpus.truncate(1);
        self.world.gpus.extend(self.far.iter().map(|far| far.gpu.clone()));
        self.world.check();
    }

    fn orders(&mut self) -> Vec<(String, Order)> {
        self.world.ledger.schedule(self.world.now);
        std::mem::take(&mut self.world.ledger.effects).orders
    }

    fn ask(&mut self, workload: &str, need: &str, node: Option<&str>) -> Result<(), AllocatorError> {
        let request = LeaseRequest {
            node: node.map(str::to_owned),
            ..LeaseRequest::new(workload, "alice", need.parse().unwrap())
        };
        self.world.ledger.request(&request, self.world.now)?;
        self.settle();
        Ok(())
    }

    fn lease(&self, workload: &str) -> Lease {
        let leases = self.world.ledger.all_leases();
        leases.into_iter().find(|lease| lease.workload == workload).expect("a lease")
    }

    fn pass(&mut self, seconds: u64) {
        self.world.now.steady += Duration::from_secs(seconds);
        self.world.now.wall += Duration::from_secs(seconds);
        self.world.ledger.tick(self.world.now);
        self.settle();
    }

    fn renew(&mut self, at: usize) -> bool {
        self.world.ledger.renew_node(&self.far[at].name, self.far[at].fence, self.world.now)
    }

    fn leave(&mut self, at: usize) {
        self.world.ledger.leave(&self.far[at].name, self.far[at].fence, self.world.now);
        self.settle();
    }

    fn node(&self, name: &str) -> NodeState {
        self.world.ledger.node_infos().into_iter().find(|node| node.name == name).unwrap().state
    }

    fn release(&mut self, workload: &str) {
        self.world.ledger.release(workload, self.world.now);
        self.settle();
    }
}

#[test]
fn slices_of_other_machines_are_granted_where_they_are_asked_for() {
    let mut cluster = Cluster::new(&["dgx-2", "dgx-3"]);
    cluster.ask("w-1-1", "3g.20gb", Some("dgx-3")).unwrap();
    let lease = cluster.lease("w-1-1");
    assert_eq!((lease.node.as_str(), lease.slices[0].gpu.as_str()), ("dgx-3", "GPU-of-dgx-3"));
    cluster.ask("w-2-1", "7g.40gb", Some("dgx-3")).unwrap();
    assert!(!cluster.world.is_granted("w-2-1"), "others have room, but they were not asked for");
    let nowhere = cluster.ask("w-3-1", "1g.5gb", Some("dgx-9")).unwrap_err();
    assert!(matches!(&nowhere, AllocatorError::Impossible(text) if text.contains("dgx-2")), "{nowhere}");
    let map = cluster.world.ledger.map();
    let at: Vec<(&str, u32)> = map.gpus.iter().map(|gpu| (gpu.node.as_str(), gpu.index)).collect();
    assert_eq!(at, [("dgx-2", 0), ("dgx-3", 0), ("node-1", 0)]);
}

#[test]
fn a_gang_lies_on_as_many_machines_as_it_asks_for() {
    let mut cluster = Cluster::new(&["dgx-2", "dgx-3"]);
    let gang =
        LeaseRequest { slices: 2, nodes: Some(2), ..LeaseRequest::new("j-1-1", "alice", "4g.20gb".parse().unwrap()) };
    cluster.ask("w-1-1", "4g.20gb", Some("node-1")).ok();
    cluster.world.ledger.request(&gang, cluster.world.now).unwrap();
    cluster.settle();
    let mut nodes: Vec<String> = cluster.lease("j-1-1").slices.into_iter().map(|slice| slice.node).collect();
    nodes.sort();
    assert_eq!(nodes, ["dgx-2", "dgx-3"]);
}

#[test]
fn a_node_that_comes_back_in_time_keeps_its_leases() {
    let mut cluster = Cluster::new(&["dgx-2"]);
    cluster.ask("w-1-1", "3g.20gb", Some("dgx-2")).unwrap();
    cluster.leave(0);
    assert_eq!(cluster.node("dgx-2"), NodeState::Away);
    cluster.ask("w-2-1", "3g.20gb", Some("dgx-2")).unwrap();
    assert!(!cluster.world.is_granted("w-2-1"), "nothing is granted where nobody answers");
    cluster.pass(GRACE - 1);
    assert!(cluster.world.is_granted("w-1-1"));
    cluster.join(0, false).unwrap();
    assert_eq!(cluster.node("dgx-2"), NodeState::Ready);
    assert!(cluster.world.is_granted("w-1-1") && cluster.world.is_granted("w-2-1"));
}

#[test]
fn a_node_that_does_not_renew_is_lost_and_what_is_held_there_stays_held() {
    let mut cluster = Cluster::new(&["dgx-2"]);
    cluster.ask("w-1-1", "7g.40gb", Some("dgx-2")).unwrap();
    for _ in 0..5 {
        cluster.pass(LEASE);
        assert!(cluster.renew(0));
    }
    cluster.pass(GRACE);
    let Some(LeaseState::Ended { reason }) = cluster.world.state("w-1-1") else { panic!("it is not over") };
    assert!(reason.contains("dgx-2 is lost"), "{reason}");
    assert!(!cluster.renew(0), "it is heard no more");
    let refused = cluster.join(0, false).unwrap_err();
    assert!(refused.stop_first, "{refused:?}");
    cluster.join(0, true).unwrap();
    cluster.ask("w-2-1", "7g.40gb", Some("dgx-2")).unwrap();
    assert!(!cluster.world.is_granted("w-2-1"), "nobody has said that no container is left");
    cluster.release("w-1-1");
    assert!(cluster.world.is_granted("w-2-1"));
}

#[test]
fn a_machine_that_began_anew_has_ended_what_ran() {
    let mut cluster = Cluster::new(&["dgx-2"]);
    cluster.ask("w-1-1", "3g.20gb", Some("dgx-2")).unwrap();
    cluster.leave(0);
    cluster.far[0].boot = "boot-2".to_owned();
    cluster.far[0].gpu.reboot();
    cluster.join(0, true).unwrap();
    assert!(matches!(cluster.world.state("w-1-1"), Some(LeaseState::Ended { .. })));
}

#[test]
fn another_machine_does_not_take_a_name_that_is_in_use() {
    let mut cluster = Cluster::new(&["dgx-2"]);
    let join = |cluster: &mut Cluster, node: &str| {
        let (machine, boot) = ("machine-other".to_owned(), "boot-9".to_owned());
        let joining = Joining { node: node.to_owned(), machine, boot, stopped: true };
        cluster.world.ledger.join(&joining, cluster.world.now)
    };
    assert!(join(&mut cluster, "dgx-2").is_err());
    assert!(join(&mut cluster, "node-1").is_err(), "the allocator's own");
    cluster.leave(0);
    assert!(join(&mut cluster, "dgx-2").is_err(), "it may come back");
    cluster.pass(GRACE);
    join(&mut cluster, "dgx-2").unwrap();
}

#[test]
fn a_gpu_that_another_machine_has_is_not_believed() {
    let mut cluster = Cluster::new(&["dgx-2", "dgx-3"]);
    cluster.ask("w-1-1", "3g.20gb", Some("dgx-2")).unwrap();
    cluster.far[1].gpu.reading.uuid = "GPU-of-dgx-2".to_owned();
    cluster.report(1, Report::Listed(vec![Listed { index: 0, uuid: Ok("GPU-of-dgx-2".to_owned()) }]));
    cluster.report(1, cluster.far[1].gpu.read());
    assert_eq!(cluster.lease("w-1-1").node, "dgx-2");
    assert!(cluster.world.is_granted("w-1-1"), "what the other says of it does not count");
    let map = cluster.world.ledger.map();
    let faulty = map.gpus.iter().find(|gpu| gpu.node == "dgx-3" && gpu.uuid == "GPU-of-dgx-2").unwrap();
    assert!(faulty.fault.as_ref().is_some_and(|fault| fault.contains("dgx-2")), "{faulty:?}");
}

#[test]
fn a_gpu_that_was_moved_is_used_where_it_is() {
    let mut cluster = Cluster::new(&["dgx-2", "dgx-3"]);
    cluster.report(0, Report::Listed(Vec::new()));
    let moved = std::mem::replace(&mut cluster.far[0].gpu, FakeGpu::new(7, "A100-40GB"));
    cluster.far[1].gpu = moved;
    cluster.report(1, Report::Listed(vec![Listed { index: 0, uuid: Ok("GPU-of-dgx-2".to_owned()) }]));
    cluster.report(1, cluster.far[1].gpu.read());
    cluster.ask("w-1-1", "7g.40gb", Some("dgx-3")).unwrap();
    assert_eq!(cluster.lease("w-1-1").slices[0].gpu, "GPU-of-dgx-2");
}

#[test]
fn what_was_being_made_when_a_node_went_away_is_made_when_it_is_back() {
    let mut cluster = Cluster::new(&["dgx-2"]);
    let request = LeaseRequest {
        node: Some("dgx-2".to_owned()),
        ..LeaseRequest::new("w-1-1", "alice", "2g.10gb".parse().unwrap())
    };
    cluster.world.ledger.request(&request, cluster.world.now).unwrap();
    let orders = cluster.orders();
    let [(_, Order::Change(cut))] = orders.as_slice() else { panic!("{orders:?}") };
    let late = cluster.far[0].gpu.change(cut, Fails::Never);
    let before = cluster.far[0].fence;
    cluster.leave(0);
    cluster.join(0, false).unwrap();
    assert!(cluster.world.is_granted("w-1-1"));
    cluster.world.ledger.report_from("dgx-2", before, late, cluster.world.now);
    assert!(cluster.world.is_granted("w-1-1"), "what a connection that is over says does not count");
}

#[test]
fn nodes_are_known_after_a_restart_and_have_time_to_say_so() {
    let mut cluster = Cluster::new(&["dgx-2"]);
    let joining =
        Joining { node: "dgx-2".to_owned(), machine: "m".to_owned(), boot: "boot-1".to_owned(), stopped: true };
    let mut ledger = Ledger::new("node-1".to_owned(), Duration::from_secs(60));
    ledger.join(&joining, cluster.world.now).unwrap();
    let rows = std::mem::take(&mut ledger.effects).writes.into_iter().filter_map(|write| match write {
        Write::Node(row) => Some(row),
        _ => None,
    });
    let loaded = Loaded { nodes: rows.collect(), ..Loaded::default() };
    let now = Now { steady: Duration::from_secs(7), ..cluster.world.now };
    let mut after = Ledger::new("node-1".to_owned(), Duration::from_secs(60));
    after.load(loaded, now);
    let unsure = after.resolve(&"3g.20gb".parse().unwrap()).unwrap_err();
    assert!(matches!(&unsure, AllocatorError::Driver(text) if text.contains("dgx-2")), "{unsure}");
    assert_eq!(after.node_infos().iter().find(|node| node.name == "dgx-2").unwrap().state, NodeState::Away);
    let late = Now { steady: Duration::from_secs(7 + GRACE), ..now };
    after.tick(late);
    assert_eq!(after.node_infos().iter().find(|node| node.name == "dgx-2").unwrap().state, NodeState::Lost);
    after.forget_node("dgx-2").unwrap();
    assert!(matches!(after.forget_node("dgx-2"), Err(AllocatorError::Unknown(_))));
    cluster.settle();
}

#[test]
fn a_node_is_forgotten_only_when_nothing_of_it_is_in_use() {
    let mut cluster = Cluster::new(&["dgx-2"]);
    cluster.ask("w-1-1", "3g.20gb", Some("dgx-2")).unwrap();
    let refused =
        |cluster: &mut Cluster| matches!(cluster.world.ledger.forget_node("dgx-2"), Err(AllocatorError::Invalid(_)));
    assert!(refused(&mut cluster), "it answers");
    cluster.leave(0);
    assert!(refused(&mut cluster), "it may come back");
    cluster.pass(GRACE);
    assert!(refused(&mut cluster), "slices of it are held");
    cluster.release("w-1-1");
    cluster.world.ledger.forget_node("dgx-2").unwrap();
    cluster.settle();
    assert!(cluster.world.ledger.map().gpus.iter().all(|gpu| gpu.node == "node-1"));
}

#[test]
fn a_driver_that_fails_on_one_machine_is_no_other_machines_trouble() {
    let mut cluster = Cluster::new(&["dgx-2"]);
    cluster.report(0, Report::Down(DriverError::Absent("gone".to_owned())));
    assert_eq!(cluster.node("dgx-2"), NodeState::NoDriver);
    cluster.ask("w-1-1", "3g.20gb", None).ok();
    assert_eq!(cluster.lease("w-1-1").node, "node-1");
}
