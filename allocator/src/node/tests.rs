//! The threads, on a driver that does as it is told and on the simulated one.

use super::{
    Driver, DriverError, Instance, Listed, Node, NvmlDriver, Order, Report,
    puppet::{Puppet, SimFolder},
    supervisor::Pace,
};
use mlad::api::Placement;
use nvidia_ml_sim::state::{Fault, FaultKind};
use std::{sync::Arc, time::Duration};
use tokio::{sync::mpsc, task::spawn_blocking, time::timeout};

/// Far more than anything here takes, and less than a refresh.
const BOUND: Duration = Duration::from_secs(30);

fn start(puppet: &Arc<Puppet>, pace: Pace) -> (Node, mpsc::Receiver<Report>) {
    let (sender, reports) = mpsc::channel(256);
    let driver = Arc::clone(puppet);
    let open = Box::new(move || Ok(Arc::clone(&driver) as Arc<dyn Driver>));
    (Node::start_at(open, sender, pace).unwrap(), reports)
}

async fn next(reports: &mut mpsc::Receiver<Report>) -> Report {
    timeout(BOUND, reports.recv()).await.expect("nothing is reported").expect("the threads ended")
}

/// The first report that `wanted` finds something in.
async fn until<T>(reports: &mut mpsc::Receiver<Report>, mut wanted: impl FnMut(Report) -> Option<T>) -> T {
    let find = async {
        loop {
            if let Some(found) = wanted(next(reports).await) {
                return found;
            }
        }
    };
    timeout(BOUND, find).await.expect("it is never reported")
}

/// Ends the threads, which must not take for ever.
async fn stop(node: Node, reports: mpsc::Receiver<Report>, patience: Duration) {
    drop(reports);
    timeout(BOUND, spawn_blocking(move || node.stop(patience))).await.expect("the end has no end").unwrap();
}

#[tokio::test]
async fn an_xid_of_a_gpu_that_is_lost_is_told_and_events_go_on() {
    let machine = SimFolder::new("[[gpu]]\nmodel = \"A100-40GB\"\nmig = true\ncount = 2\n");
    let (sender, mut reports) = mpsc::channel(256);
    let library = machine.library();
    let open = Box::new(move || Ok(Arc::new(NvmlDriver::open(Some(&library))?) as Arc<dyn Driver>));
    let node = Node::start(open, sender).unwrap();
    let Report::Listed(listed) = next(&mut reports).await else { panic!("not listed first") };
    let uuid = |at: usize| listed[at].uuid.clone().unwrap();
    // Both are read after events are watched for.
    for _ in 0..2 {
        assert!(matches!(next(&mut reports).await, Report::Gpu { reading: Ok(_), .. }));
    }
    machine.change(|state| {
        state.lay(Fault { kind: FaultKind::Lost, gpu: Some(1), on: None, times: None, milliseconds: None });
    });
    // Nothing is listed in between: it is the event that tells, and not the next round, which begins with a list.
    let event = |report| match report {
        Report::Xid { gpu, xid } => Some((gpu, xid)),
        Report::Gpu { .. } => None,
        Report::Listed(_) | Report::Down(_) => panic!("events were watched for anew: {report:?}"),
    };
    assert_eq!(until(&mut reports, event).await, (uuid(1), Some(79)));
    let lost = |report| match report {
        Report::Gpu { uuid, reading: Err(DriverError::Lost(_)), .. } => Some(uuid),
        Report::Listed(_) | Report::Down(_) => panic!("events were watched for anew: {report:?}"),
        _ => None,
    };
    assert_eq!(until(&mut reports, lost).await, uuid(1));
    machine.change(|state| state.xid(0, 48, None).unwrap());
    assert_eq!(until(&mut reports, event).await, (uuid(0), Some(48)));
    stop(node, reports, BOUND).await;
}

#[tokio::test]
async fn what_happens_before_events_are_watched_for_is_not_missed() {
    let puppet = Puppet::with_gpus(1);
    puppet.pull(|strings| {
        strings.before_watching = Some(Box::new(|strings| {
            assert!(strings.asked.is_empty(), "read before events are watched for");
            let placement = Placement { start: 0, size: 1 };
            let device = super::Device::Whole("MIG-0".to_owned());
            let made = Instance { id: 1, profile: 19, placement, device, processes: 0 };
            strings.gpus.get_mut("GPU-0").unwrap().as_mut().unwrap().instances.push(made);
        }));
    });
    let (node, mut reports) = start(&puppet, Pace::default());
    let reading = |report| if let Report::Gpu { reading, .. } = report { Some(reading) } else { None };
    assert_eq!(until(&mut reports, reading).await.unwrap().instances.len(), 1);
    stop(node, reports, BOUND).await;
}

#[tokio::test]
async fn gpus_of_a_driver_without_events_are_read() {
    let puppet = Puppet::with_gpus(2);
    puppet.pull(|strings| strings.eventless = Some(DriverError::Other("no GPU tells events".to_owned())));
    let (node, mut reports) = start(&puppet, Pace::default());
    for gpu in ["GPU-0", "GPU-1"] {
        let read = |report| matches!(report, Report::Gpu { uuid, reading: Ok(_), .. } if uuid == gpu).then_some(());
        until(&mut reports, read).await;
    }
    stop(node, reports, BOUND).await;
}

#[tokio::test]
async fn a_call_that_hangs_does_not_hold_up_the_end() {
    let puppet = Puppet::with_gpus(2);
    puppet.pull(|strings| strings.hung.insert("GPU-0".to_owned()));
    let (node, mut reports) = start(&puppet, Pace::default());
    // The other is read all the same.
    let read = |report| if let Report::Gpu { uuid, .. } = report { Some(uuid) } else { None };
    assert_eq!(until(&mut reports, read).await, "GPU-1");
    stop(node, reports, Duration::from_millis(100)).await;
    puppet.pull(|strings| strings.hung.clear());
}

#[tokio::test]
async fn a_gpu_that_hangs_while_the_driver_is_opened_anew_stays_out_of_service() {
    let puppet = Puppet::with_gpus(2);
    let short = Duration::from_millis(20);
    let pace = Pace { retry: short, without_events: short, take_over: short, ..Pace::default() };
    let (node, mut reports) = start(&puppet, pace);
    let read = |wanted: &'static str| {
        move |report| match report {
            Report::Gpu { uuid, reading, .. } if uuid == wanted => Some(reading),
            _ => None,
        }
    };
    until(&mut reports, read("GPU-0")).await.unwrap();
    puppet.pull(|strings| strings.hung.insert("GPU-0".to_owned()));
    assert!(node.order("GPU-0", Order::Read));
    puppet.pull(|strings| strings.down = Some(DriverError::Absent("it is being replaced".to_owned())));
    until(&mut reports, |report| matches!(report, Report::Down(_)).then_some(())).await;
    puppet.pull(|strings| strings.down = None);
    let error = until(&mut reports, read("GPU-0")).await.unwrap_err();
    assert!(matches!(&error, DriverError::Lost(why) if why.contains("has not returned")), "{error}");
    assert!(!node.order("GPU-0", Order::Read), "nobody takes its orders");
    until(&mut reports, read("GPU-1")).await.unwrap();
    // The driver gives the thread back: another takes its place.
    puppet.pull(|strings| strings.hung.clear());
    until(&mut reports, |report| read("GPU-0")(report)?.ok()).await;
    until(&mut reports, |report| matches!(report, Report::Listed(_)).then_some(())).await;
    until(&mut reports, |report| read("GPU-0")(report)?.ok()).await;
    stop(node, reports, BOUND).await;
}

#[tokio::test]
async fn a_gpu_that_does_not_tell_its_name_is_listed() {
    let puppet = Puppet::with_gpus(1);
    puppet.pull(|strings| strings.nameless.insert("GPU-0".to_owned()));
    let (node, mut reports) = start(&puppet, Pace::default());
    let Report::Listed(listed) = next(&mut reports).await else { panic!("not listed") };
    assert!(matches!(listed.as_slice(), [Listed { index: 0, uuid: Err(DriverError::Lost(_)) }]), "{listed:?}");
    stop(node, reports, BOUND).await;
}
