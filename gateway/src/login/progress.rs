//! What a person sees while they wait, in one line. Pure.

use super::{
    text,
    width::{fit, width},
};
use jiff::{SignedDuration, Timestamp};
use mlad::api::Wait;

/// What is going on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Doing {
    /// The gateway has not said yet.
    Nothing,
    Stopping,
    Pulling(u64, Option<u64>),
    Waiting(Box<Wait>),
    Starting,
}

impl Doing {
    /// The line, at most `columns` wide less one; empty if there is nothing to say.
    pub(super) fn line(&self, began: Timestamp, now: Timestamp, columns: usize) -> String {
        let columns = columns.saturating_sub(1);
        let elapsed = now.duration_since(began);
        match self {
            Self::Nothing => String::new(),
            Self::Stopping => timed(text::STOPPING.to_owned(), elapsed, columns),
            Self::Pulling(done, total) => timed(text::pulling(*done, *total), elapsed, columns),
            Self::Starting => timed(text::STARTING.to_owned(), elapsed, columns),
            Self::Waiting(wait) => {
                let left = wait.estimate.map(|estimate| estimate.duration_since(now));
                let elapsed = now.duration_since(wait.since.max(began));
                join(text::waiting(wait, left, elapsed), columns)
            }
        }
    }

    /// What is said once on a terminal that cannot redraw; the same text means that nothing has changed.
    pub(super) fn plain(&self) -> String {
        match self {
            Self::Nothing => String::new(),
            Self::Stopping => text::STOPPING.to_owned(),
            Self::Pulling(..) => text::PULLING.to_owned(),
            Self::Starting => text::STARTING.to_owned(),
            Self::Waiting(wait) => format!("{}, {} ({})", text::waiting_for(wait), text::place(wait), text::CTRL_C),
        }
    }

    /// When the line changes by itself: every second, since it shows a clock.
    pub(super) fn ticks(&self) -> bool {
        *self != Self::Nothing
    }
}

fn timed(text: String, elapsed: SignedDuration, columns: usize) -> String {
    join(vec![(0, text), (1, text::clock(elapsed))], columns)
}

/// The parts that there is room for: where there is not enough, those of the highest rank go first.
fn join(mut parts: Vec<(u8, String)>, columns: usize) -> String {
    loop {
        let texts: Vec<&str> = parts.iter().map(|(_, text)| text.as_str()).collect();
        let line = texts.join(", ");
        let last = parts.iter().enumerate().max_by_key(|(_, (rank, _))| *rank).map(|(at, _)| at);
        match last {
            Some(last) if parts.len() > 1 && width(&line) > columns => {
                parts.remove(last);
            }
            _ => return fit(&line, columns),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlad::api::{Need, WaitReason};

    fn wait() -> Wait {
        Wait {
            project: None,
            slices: 1,
            nodes: None,
            priority: 0,
            workload: "w-1-1".into(),
            user: "alice".into(),
            need: Need::Profile("2g.10gb".into()),
            since: at(0),
            reason: WaitReason::NoSlice,
            detail: "every slice is held".into(),
            place: 3,
            waiting: 16,
            estimate: Some(at(42 + 12 * 60)),
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn the_line_says_less_where_there_is_less_room() {
        let waiting = Doing::Waiting(Box::new(wait()));
        for (columns, line) in [
            (200, "waiting for 2g.10gb: none is free, place 3 of 16, about 12 min, 0:42, Ctrl-C gives up"),
            (80, "waiting for 2g.10gb: none is free, place 3 of 16, about 12 min, 0:42"),
            (60, "waiting for 2g.10gb: none is free, place 3 of 16, 0:42"),
            (40, "place 3 of 16, 0:42"),
            (20, "place 3 of 16, 0:42"),
            (15, "place 3 of 16"),
            (10, "place 3 …"),
            (2, "…"),
            (1, ""),
            (0, ""),
        ] {
            assert_eq!(waiting.line(at(0), at(42), columns), line, "{columns}");
        }
    }

    #[test]
    fn every_reason_and_step_has_its_words() {
        let line = |doing: &Doing| doing.line(at(0), at(3723), 200);
        let mut wait = wait();
        wait.estimate = None;
        for (reason, words) in [
            (WaitReason::Priority, "waiting for 2g.10gb: others came first"),
            (WaitReason::NoSlice, "waiting for 2g.10gb: none is free"),
            (WaitReason::Quota, "waiting for 2g.10gb: your quota is used up"),
            (WaitReason::Repartitioning, "waiting for 2g.10gb: it is being made"),
            (WaitReason::NodeUnavailable, "waiting for 2g.10gb: a GPU node does not answer"),
        ] {
            wait.reason = reason;
            let doing = Doing::Waiting(Box::new(wait.clone()));
            assert_eq!(line(&doing), format!("{words}, place 3 of 16, 1:02:03, Ctrl-C gives up"));
            assert_eq!(doing.plain(), format!("{words}, place 3 of 16 (Ctrl-C gives up)"));
        }
        assert_eq!(line(&Doing::Nothing), "");
        assert_eq!(line(&Doing::Starting), "starting the container, 1:02:03");
        assert_eq!(line(&Doing::Stopping), "waiting for this workspace's last container to end, 1:02:03");
        assert_eq!(line(&Doing::Pulling(0, None)), "fetching the image, 1:02:03");
        assert_eq!(line(&Doing::Pulling(5 << 20, None)), "fetching the image: 5 MiB, 1:02:03");
        assert_eq!(line(&Doing::Pulling(5 << 20, Some(9 << 20))), "fetching the image: 5 of 9 MiB, 1:02:03");
        // The plain words do not change with every byte.
        assert_eq!(Doing::Pulling(1, None).plain(), Doing::Pulling(2, Some(3)).plain());
    }

    #[test]
    fn estimates_are_rough() {
        let mut wait = wait();
        for (seconds, words) in [
            (-5, "less than a minute"),
            (59, "less than a minute"),
            (61, "about 1 min"),
            (3599, "about 59 min"),
            (3 * 3600 + 600, "about 3 h 10 min"),
        ] {
            wait.estimate = Some(at(seconds));
            let line = Doing::Waiting(Box::new(wait.clone())).line(at(0), at(0), 200);
            assert!(line.contains(words), "{line}");
        }
    }
}
