use super::*;
use crate::AccountName;

const HOUR: i64 = 3_600_000_000;

/// A sound ledger: two leases that hold a half each, one that is over, one without a GPU, one request that waits.
fn sound() -> Records {
    let request = |seq: i64, workload: &str, slices, ended_at| Request {
        workload: workload.to_owned(),
        seq,
        user: "alice".to_owned(),
        project: Some("vision".to_owned()),
        slices,
        limits: Limits { slices: Some(2), ..Limits::default() },
        requested_at: seq * HOUR,
        ended_at,
    };
    let lease = |fence: i64, workload: &str, profile: &str, released_at| Lease {
        fence,
        workload: workload.to_owned(),
        profile: profile.to_owned(),
        memory_mib: 20_000,
        share: 500_000,
        granted_at: fence * HOUR + 1,
        renewed_at: fence * HOUR + 1,
        expires_at: fence * HOUR + 60,
        over_at: None,
        released_at,
    };
    let slice = |fence, start, released_at| Slice {
        fence,
        gpu: "GPU-0".to_owned(),
        profile: 9,
        start,
        size: 4,
        whole: false,
        released_at,
    };
    let account = |name: &str, parent: Option<&str>, slices| Account {
        name: AccountName::Project(name.to_owned()),
        parent: parent.map(str::to_owned),
        shares: 1,
        limits: Limits { slices: Some(slices), ..Limits::default() },
    };
    Records {
        requests: vec![
            request(1, "w-1", 1, Some(2 * HOUR)),
            request(2, "w-2", 1, None),
            request(3, "w-3", 1, None),
            request(4, "w-4", 1, None),
            request(5, "w-5", 1, None),
        ],
        leases: vec![
            lease(1, "w-1", "3g.20gb", Some(2 * HOUR)),
            lease(2, "w-2", "3g.20gb", None),
            lease(3, "w-3", "3g.20gb", None),
            Lease { share: 0, ..lease(4, "w-4", "cpu", None) },
        ],
        slices: vec![slice(1, 0, Some(2 * HOUR)), slice(2, 0, None), slice(3, 4, None)],
        changes: Vec::new(),
        reserved: Vec::new(),
        said: Vec::new(),
        accounts: vec![account("vision", Some("lab"), 5), account("lab", None, 2)],
        used: vec![Used { day: 0, user: "alice".to_owned(), project: "vision".to_owned(), slice_us: HOUR - 1 }],
        counters: Counters { fence: 4, seq: 5, change: 0 },
    }
}

#[test]
fn a_sound_ledger_has_no_findings() {
    assert_eq!(check(&sound(), Allowance::default()), []);
    assert_eq!(check(&Records::default(), Allowance::default()), []);
}

/// Whatever is wrong is found, by the rule that it breaks.
#[test]
fn every_fault_is_named() {
    use Rule::{Asked, Changes, Fences, Held, OneHolder, Quota, Times, Use};
    type Spoil = fn(&mut Records);
    let cases: [(&str, Rule, Spoil); 26] = [
        ("two hold a column", OneHolder, |r| r.slices[2].start = 3),
        ("one holds a column of a whole GPU", OneHolder, |r| r.slices[1].whole = true),
        ("a whole GPU is granted where a slice is held", OneHolder, |r| r.slices[2].whole = true),
        ("granted before it was released", OneHolder, |r| {
            r.leases[0].released_at = Some(2 * HOUR + 2);
            r.requests[0].ended_at = Some(2 * HOUR + 2);
        }),
        ("the same lease, twice the same column", OneHolder, |r| {
            r.requests[2].slices = 2;
            let again = r.slices[2].clone();
            r.slices.push(again);
        }),
        ("never asked for", Asked, |r| drop(r.requests.remove(1))),
        ("granted before it was asked for", Asked, |r| r.requests[1].requested_at += HOUR / 2),
        ("a fence twice", Fences, |r| r.leases[3].fence = 3),
        ("a fence that was never given", Fences, |r| r.counters.fence = 3),
        ("a later fence at an earlier time", Fences, |r| {
            r.leases[1].fence = 9;
            r.slices[1].fence = 9;
            r.counters.fence = 9;
        }),
        ("a number of a request twice", Fences, |r| r.requests[4].seq = 4),
        ("a change that was never numbered", Fences, |r| {
            r.changes.push(Change { id: 1, gpu: "GPU-1".to_owned(), destroys: Vec::new(), makes: None });
        }),
        ("over the limit of its user", Quota, |r| {
            r.requests.iter_mut().for_each(|request| request.limits.slices = Some(1));
        }),
        ("over the memory of its user", Quota, |r| {
            r.requests.iter_mut().for_each(|request| request.limits.gpu_memory_mib = Some(39_999));
        }),
        ("over the limit of the project that its project lies in", Quota, |r| {
            r.accounts[1].limits.slices = Some(1);
        }),
        ("not released, and its request is over", Held, |r| r.requests[1].ended_at = Some(9 * HOUR)),
        ("released, and its request is not over", Held, |r| r.requests[0].ended_at = None),
        ("not released, and its slice is free", Held, |r| r.slices[1].released_at = Some(9 * HOUR)),
        ("released, and its slice is not free", Held, |r| r.slices[0].released_at = None),
        ("not released, and holds nothing", Held, |r| drop(r.slices.remove(1))),
        ("a slice of no lease", Held, |r| r.slices[2].fence = 17),
        ("renewed before it was granted", Times, |r| r.leases[1].renewed_at = 2 * HOUR),
        ("expires before it was renewed", Times, |r| r.leases[1].expires_at = 2 * HOUR),
        ("a held slice is being destroyed", Changes, |r| {
            r.counters.change = 1;
            let destroys = vec![(9, 4)];
            r.changes.push(Change { id: 1, gpu: "GPU-0".to_owned(), destroys, makes: None });
        }),
        ("one is made where another is held", Changes, |r| {
            r.counters.change = 1;
            r.changes.push(Change { id: 1, gpu: "GPU-0".to_owned(), destroys: Vec::new(), makes: Some((6, 1)) });
        }),
        ("use is not written down", Use, |r| r.used[0].slice_us -= 1),
    ];
    for (what, rule, spoil) in cases {
        let mut records = sound();
        spoil(&mut records);
        let findings = check(&records, Allowance::default());
        assert!(findings.iter().any(|finding| finding.rule == rule && !finding.explained), "{what}: {findings:?}");
    }
}

#[test]
fn what_is_allowed_is_no_finding() {
    let mut records = sound();
    records.leases[0].released_at = Some(2 * HOUR + 2);
    records.requests[0].ended_at = Some(2 * HOUR + 2);
    records.used[0].slice_us += 2;
    let clock = Allowance { clock_set_back_us: 2, ..Allowance::default() };
    assert_eq!(check(&records, clock), []);

    let mut records = sound();
    records.accounts[1].limits.slices = Some(1);
    let lowered = Allowance { limits_changed: true, ..Allowance::default() };
    let findings = check(&records, lowered);
    assert!(matches!(findings.as_slice(), [Finding { rule: Rule::Quota, explained: true, .. }]), "{findings:?}");
}

#[test]
fn limits_that_were_raised_hold_from_then_on() {
    let mut records = sound();
    records.requests[1].limits.slices = Some(1);
    records.requests[2].limits.slices = Some(1);
    records.requests[0].limits.slices = Some(1);
    assert!(!check(&records, Allowance::default()).is_empty());
    records.requests[2].limits.slices = Some(2);
    assert_eq!(check(&records, Allowance::default()), []);
}

#[test]
fn projects_that_lie_in_one_another_are_no_endless_loop() {
    let mut records = sound();
    records.accounts[1].parent = Some("vision".to_owned());
    assert_eq!(check(&records, Allowance::default()), []);
}

#[test]
fn what_is_granted_where_it_lasts_into_a_reservation_is_found() {
    // Fence 2 was granted at some time on the first columns.
    let mut records = sound();
    let granted = records.leases.iter().find(|lease| lease.fence == 2).unwrap().granted_at;
    let said = |expected_us, reservation| Said { workload: "w-2".to_owned(), reservation, expected_us };
    records.reserved = vec![Reserved {
        reservation: 9,
        name: "course".to_owned(),
        from: granted + HOUR,
        until: granted + 2 * HOUR,
        chosen_at: granted - 1,
        gpu: records.slices[1].gpu.clone(),
        start: 3,
        size: 1,
        whole: false,
    }];
    let rules = |records: &Records| -> Vec<Rule> {
        check(records, Allowance::default()).into_iter().map(|finding| finding.rule).collect()
    };
    for (said, found) in [
        (said(Some(HOUR), None), false),
        (said(Some(HOUR + 1), None), true),
        (said(None, None), true),
        (said(None, Some(9)), false),
    ] {
        records.said = vec![said.clone()];
        assert_eq!(rules(&records) == [Rule::Reserved], found, "{said:?}: {:?}", rules(&records));
    }
    records.said = vec![said(None, None)];
    records.reserved[0].chosen_at = granted + 1;
    assert!(rules(&records).is_empty(), "it was there before");
    records.reserved[0] = Reserved { chosen_at: granted - 2, until: granted - 1, ..records.reserved[0].clone() };
    assert!(rules(&records).is_empty(), "it was moved before");
}
