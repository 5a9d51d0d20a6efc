//! What a user or a project holds and has used: sums that cost the same however much there is of it.

use crate::PERIOD_DAYS;
use jiff::Timestamp;
use std::collections::BTreeMap;

/// What holding something counts for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Charge {
    /// Slices.
    pub slices: u32,
    /// GPU memory of them all, in MiB.
    pub memory_mib: u64,
    /// What of whole GPUs they are together, in millionths.
    pub share: u64,
    /// Since when it is held.
    pub since: Timestamp,
    /// Seconds it lasts at most, if that is known.
    pub expected_seconds: Option<u64>,
}

impl Charge {
    /// GPU time it comes to in all, in microseconds, if its length is known.
    fn expected_us(&self) -> Option<u64> {
        self.expected_seconds.map(|seconds| self.share.saturating_mul(seconds))
    }

    /// GPUs.
    fn rate(&self) -> f64 {
        self.share as f64 / MILLION as f64
    }
}

const MILLION: u64 = 1_000_000;
/// What is held counts in the fair share as if it were held for this long still: who has just been granted much
/// comes after who has not.
pub(super) const CREDIT_SECONDS: f64 = 3600.0;

/// What one user or project holds and has used.
#[derive(Debug, Clone, Default)]
pub(super) struct Meter {
    pub(super) slices: u32,
    pub(super) memory_mib: u64,
    /// GPU time of what is over, in microseconds, by day since 1970.
    days: BTreeMap<i64, u64>,
    /// GPU time that what is held and has a known length comes to in all, in microseconds.
    committed_us: u64,
    /// What is held without a known length: shares, and shares times microseconds of 1970 since when.
    open_share: u64,
    open_weight: i128,
    fading: Fading,
}

impl Meter {
    pub(super) fn add(&mut self, charge: &Charge, now: Timestamp, half_life: f64) {
        self.slices = self.slices.saturating_add(charge.slices);
        self.memory_mib = self.memory_mib.saturating_add(charge.memory_mib);
        match charge.expected_us() {
            Some(all) => self.committed_us = self.committed_us.saturating_add(all),
            None => {
                self.open_share = self.open_share.saturating_add(charge.share);
                self.open_weight += weight(charge);
            }
        }
        self.fading.settle(now, half_life);
        self.fading.value += charge.rate() * faded_second(seconds_between(charge.since, now), half_life);
        self.fading.rate += charge.rate();
    }

    pub(super) fn take(&mut self, charge: &Charge, now: Timestamp, half_life: f64) {
        self.slices = self.slices.saturating_sub(charge.slices);
        self.memory_mib = self.memory_mib.saturating_sub(charge.memory_mib);
        match charge.expected_us() {
            Some(all) => self.committed_us = self.committed_us.saturating_sub(all),
            None => {
                self.open_share = self.open_share.saturating_sub(charge.share);
                self.open_weight -= weight(charge);
            }
        }
        self.fading.settle(now, half_life);
        self.fading.rate = (self.fading.rate - charge.rate()).max(0.0);
        if self.slices == 0 {
            // What rounding has left.
            self.fading.rate = 0.0;
        }
    }

    /// Counts GPU time that was used on a day by what is over. It fades already if `faded` says so: a lease that
    /// ends now has been counted while it was held.
    pub(super) fn spend(&mut self, day: i64, gpu_us: u64, faded: bool, now: Timestamp, half_life: f64) {
        let used = self.days.entry(day).or_default();
        *used = used.saturating_add(gpu_us);
        if !faded {
            self.fading.settle(now, half_life);
            let noon = (day * 24 + 12) * 3600;
            let age = (now.as_second() - noon).max(0) as f64;
            self.fading.value += gpu_us as f64 / MILLION as f64 * (-age / half_life).exp2();
        }
        let first = self.first_day(now);
        self.days.retain(|day, _| *day >= first);
    }

    /// Counts what another counts, too.
    pub(super) fn plus(&mut self, other: &Self, now: Timestamp, half_life: f64) {
        self.slices = self.slices.saturating_add(other.slices);
        self.memory_mib = self.memory_mib.saturating_add(other.memory_mib);
        self.committed_us = self.committed_us.saturating_add(other.committed_us);
        self.open_share = self.open_share.saturating_add(other.open_share);
        self.open_weight += other.open_weight;
        for (day, used) in &other.days {
            let sum = self.days.entry(*day).or_default();
            *sum = sum.saturating_add(*used);
        }
        self.fading.settle(now, half_life);
        self.fading.value += other.fading.at(now, half_life);
        self.fading.rate += other.fading.rate;
    }

    /// Counts what another counts no longer.
    pub(super) fn minus(&mut self, other: &Self, now: Timestamp, half_life: f64) {
        self.slices = self.slices.saturating_sub(other.slices);
        self.memory_mib = self.memory_mib.saturating_sub(other.memory_mib);
        self.committed_us = self.committed_us.saturating_sub(other.committed_us);
        self.open_share = self.open_share.saturating_sub(other.open_share);
        self.open_weight -= other.open_weight;
        for (day, used) in &other.days {
            self.days.entry(*day).and_modify(|sum| *sum = sum.saturating_sub(*used));
        }
        self.fading.settle(now, half_life);
        self.fading.value = (self.fading.value - other.fading.at(now, half_life)).max(0.0);
        self.fading.rate = (self.fading.rate - other.fading.rate).max(0.0);
    }

    /// GPU time used in the period, in microseconds: what is over, and what is held without a known length so far.
    pub(super) fn used_us(&self, now: Timestamp) -> u64 {
        let over: u64 = self.days.range(self.first_day(now)..).map(|(_, used)| *used).sum();
        let open = i128::from(self.open_share) * i128::from(now.as_microsecond()) - self.open_weight;
        over.saturating_add(u64::try_from(open / i128::from(MILLION)).unwrap_or(0))
    }

    /// GPU time that what is held with a known length may come to, in microseconds.
    pub(super) fn committed_us(&self) -> u64 {
        self.committed_us
    }

    /// When what is held without a known length has used up `limit_seconds`, if it will.
    pub(super) fn exhausted_at(&self, limit_seconds: u64, now: Timestamp) -> Option<Timestamp> {
        if self.open_share == 0 {
            return None;
        }
        let limit = limit_seconds.saturating_mul(MILLION);
        let left = limit.saturating_sub(self.used_us(now)).saturating_sub(self.committed_us);
        let micros = i128::from(left) * i128::from(MILLION) / i128::from(self.open_share);
        let micros = i64::try_from(micros).ok()?;
        Timestamp::from_microsecond(now.as_microsecond().checked_add(micros)?).ok()
    }

    /// Used GPU time in seconds, as it has faded; and with what is held now counted ahead.
    pub(super) fn faded(&self, now: Timestamp, half_life: f64) -> (f64, f64) {
        let value = self.fading.at(now, half_life);
        (value, value + self.fading.rate * CREDIT_SECONDS)
    }

    fn first_day(&self, now: Timestamp) -> i64 {
        now.as_second().div_euclid(86_400) - i64::from(PERIOD_DAYS) + 1
    }
}

fn weight(charge: &Charge) -> i128 {
    i128::from(charge.share) * i128::from(charge.since.as_microsecond())
}

fn seconds_between(from: Timestamp, until: Timestamp) -> f64 {
    (until.as_microsecond().saturating_sub(from.as_microsecond())).max(0) as f64 / MILLION as f64
}

/// What one GPU that was in use for so many seconds until now counts for.
fn faded_second(seconds: f64, half_life: f64) -> f64 {
    half_life / std::f64::consts::LN_2 * (1.0 - (-seconds / half_life).exp2())
}

/// GPU time that counts half after every half-life, in closed form while the number of GPUs stays the same.
#[derive(Debug, Clone)]
struct Fading {
    value: f64,
    rate: f64,
    since: Timestamp,
}

impl Default for Fading {
    fn default() -> Self {
        Self { value: 0.0, rate: 0.0, since: Timestamp::UNIX_EPOCH }
    }
}

impl Fading {
    fn at(&self, now: Timestamp, half_life: f64) -> f64 {
        let passed = seconds_between(self.since, now);
        self.value * (-passed / half_life).exp2() + self.rate * faded_second(passed, half_life)
    }

    fn settle(&mut self, now: Timestamp, half_life: f64) {
        (self.value, self.since) = (self.at(now, half_life), now.max(self.since));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const WEEK: f64 = 7.0 * 86_400.0;

    fn time(second: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + second).unwrap()
    }

    fn charge(share: u64, since: i64, expected_seconds: Option<u64>) -> Charge {
        Charge { slices: 1, memory_mib: 4864, share, since: time(since), expected_seconds }
    }

    #[test]
    fn use_counts_half_after_the_half_life() {
        let mut meter = Meter::default();
        let whole = charge(1_000_000, 0, None);
        meter.add(&whole, time(0), WEEK);
        meter.take(&whole, time(3600), WEEK);
        let (now, _) = meter.faded(time(3600), WEEK);
        assert!((3590.0..=3600.0).contains(&now), "{now}");
        let (later, _) = meter.faded(time(3600 + 7 * 86_400), WEEK);
        assert!((later / now - 0.5).abs() < 1e-9, "{later} of {now}");
    }

    #[test]
    fn gpu_time_is_used_up_at_the_time_foretold() {
        let mut meter = Meter::default();
        meter.add(&charge(250_000, 0, None), time(0), WEEK);
        meter.add(&charge(500_000, 0, Some(1000)), time(0), WEEK);
        // 2,000 s of a GPU: 500 are the known one's, a quarter of a GPU uses the rest in 6,000 s.
        assert_eq!(meter.exhausted_at(2000, time(0)), Some(time(6000)));
        assert_eq!(meter.exhausted_at(2000, time(1000)), Some(time(6000)));
        assert_eq!(meter.used_us(time(4000)), 1000 * MILLION);
    }

    proptest! {
        /// However it is held and given back, in the end nothing is held, and use never grows by itself.
        #[test]
        fn sums_come_out(held in prop::collection::vec((1u64..8, 0i64..1000, prop::option::of(1u64..5000)), 1..40)) {
            let mut meter = Meter::default();
            let charges: Vec<Charge> =
                held.iter().map(|(share, since, expected)| charge(share * 125_000, *since, *expected)).collect();
            for charge in &charges {
                meter.add(charge, time(1000), WEEK);
            }
            for charge in &charges {
                meter.take(charge, time(2000), WEEK);
            }
            prop_assert_eq!((meter.slices, meter.memory_mib, meter.committed_us(), meter.open_share), (0, 0, 0, 0));
            prop_assert_eq!(meter.open_weight, 0);
            let (first, _) = meter.faded(time(2000), WEEK);
            let (second, _) = meter.faded(time(3000), WEEK);
            prop_assert!(second < first);
            let exact: f64 = charges.iter().map(|charge| charge.rate() * seconds_between(charge.since, time(2000))).sum();
            prop_assert!(first <= exact && first > 0.99 * exact, "{first} of {exact}");
        }
    }
}
