//! `~` and `*?[…]` in the words of a command, as a POSIX shell expands them. `\` takes away a character's
//! meaning. Names are bytes, so none of the crates for patterns over text would do.

use super::super::WorkerError;
use rustix::fs::{Dir, Mode, OFlags};

/// Paths all words of a command may become, those on the way to them included.
const MAX_PATHS: usize = 1_000_000;
/// Bytes of them, all together.
const MAX_BYTES: usize = 64 << 20;

/// What the words of one command may still become.
#[derive(Debug)]
pub(super) struct Budget {
    paths: usize,
    bytes: usize,
}

impl Default for Budget {
    fn default() -> Self {
        Self { paths: MAX_PATHS, bytes: MAX_BYTES }
    }
}

impl Budget {
    fn take(&mut self, path: &[u8]) -> Result<(), WorkerError> {
        match (self.paths.checked_sub(1), self.bytes.checked_sub(path.len())) {
            (Some(paths), Some(bytes)) => {
                *self = Self { paths, bytes };
                Ok(())
            }
            _ => Err(WorkerError::Bound(format!(
                "more than {MAX_PATHS} files match, or their names are longer than {} MiB together: copy their folder \
                 with -r, which has no bound",
                MAX_BYTES >> 20
            ))),
        }
    }
}

/// The paths that `word` stands for, in the order of their bytes; the word itself if there is none.
pub(super) fn expand(user: &str, home: &[u8], word: &[u8], budget: &mut Budget) -> Result<Vec<Vec<u8>>, WorkerError> {
    let word = expand_home(user, home, word);
    let mut found = vec![if word.starts_with(b"/") { b"/".to_vec() } else { Vec::new() }];
    if !has_pattern(&word) {
        return Ok(vec![unquote(&word)]);
    }
    for component in word.split(|byte| *byte == b'/').filter(|component| !component.is_empty()) {
        let mut next = Vec::new();
        for folder in &found {
            step(folder, component, budget, &mut next)?;
        }
        found = next;
    }
    found.sort();
    Ok(if found.is_empty() { vec![unquote(&word)] } else { found })
}

fn expand_home(user: &str, home: &[u8], word: &[u8]) -> Vec<u8> {
    let Some(rest) = word.strip_prefix(b"~") else { return word.to_vec() };
    let rest = rest.strip_prefix(user.as_bytes()).unwrap_or(rest);
    if rest.is_empty() || rest.starts_with(b"/") { [home, rest].concat() } else { word.to_vec() }
}

/// Adds the paths in `folder` that match one component.
fn step(folder: &[u8], component: &[u8], budget: &mut Budget, found: &mut Vec<Vec<u8>>) -> Result<(), WorkerError> {
    let join = |name: &[u8]| match folder {
        b"" | b"/" => [folder, name].concat(),
        _ => [folder, b"/", name].concat(),
    };
    if !has_pattern(component) {
        let path = join(&unquote(component));
        if rustix::fs::lstat(path.as_slice()).is_ok() {
            budget.take(&path)?;
            found.push(path);
        }
        return Ok(());
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = rustix::fs::open(if folder.is_empty() { b"." } else { folder }, flags, Mode::empty());
    let Ok(entries) = opened.and_then(Dir::new) else { return Ok(()) };
    for entry in entries.map_while(Result::ok) {
        let name = entry.file_name().to_bytes();
        // A name with a dot in front is matched by a dot only; so `.` and `..` are not by `*`.
        let is_hidden = name.starts_with(b".") && (!component.starts_with(b".") || name == b"." || name == b"..");
        if !is_hidden && matches(component, name) {
            let path = join(name);
            budget.take(&path)?;
            found.push(path);
        }
    }
    Ok(())
}

fn has_pattern(word: &[u8]) -> bool {
    let mut bytes = word.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' => drop(bytes.next()),
            b'*' | b'?' | b'[' => return true,
            _ => {}
        }
    }
    false
}

fn unquote(word: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(word.len());
    let mut bytes = word.iter();
    while let Some(byte) = bytes.next() {
        plain.extend(if *byte == b'\\' { bytes.next().or(Some(byte)) } else { Some(byte) });
    }
    plain
}

/// Whether all of `name` matches `pattern`. Only the last `*` is ever gone back to, which is enough and keeps
/// the time to the product of the lengths.
fn matches(mut pattern: &[u8], mut name: &[u8]) -> bool {
    let mut last_star: Option<(&[u8], &[u8])> = None;
    loop {
        if let Some(rest) = pattern.strip_prefix(b"*") {
            last_star = Some((rest, name));
            pattern = rest;
            continue;
        }
        match (name.split_first(), match_one(pattern, name.first().copied())) {
            (None, _) if pattern.is_empty() => return true,
            (Some((_, rest_of_name)), Some(rest)) => (pattern, name) = (rest, rest_of_name),
            _ => match last_star {
                Some((after_star, [_, from @ ..])) => {
                    last_star = Some((after_star, from));
                    (pattern, name) = (after_star, from);
                }
                _ => return false,
            },
        }
    }
}

/// The rest of the pattern if its first element matches `byte`.
fn match_one(pattern: &[u8], byte: Option<u8>) -> Option<&[u8]> {
    let byte = byte?;
    match pattern.split_first()? {
        (b'?', rest) => Some(rest),
        (b'\\', rest) => rest.split_first().filter(|(literal, _)| **literal == byte).map(|(_, rest)| rest),
        (b'[', inside) => match set(inside, byte) {
            Some((contains, rest)) => contains.then_some(rest),
            // Never closed: a bracket like any other character.
            None => (byte == b'[').then_some(inside),
        },
        (literal, rest) => (*literal == byte).then_some(rest),
    }
}

/// Whether the set, which begins after its `[`, contains `byte`, and what follows it; `None` if it has no end.
fn set(mut inside: &[u8], byte: u8) -> Option<(bool, &[u8])> {
    let negated = matches!(inside.first(), Some(b'!' | b'^'));
    if negated {
        inside = inside.get(1..)?;
    }
    let (mut contains, mut first) = (false, true);
    loop {
        let (low, rest) = inside.split_first()?;
        match (low, rest) {
            (b']', _) if !first => return Some((contains != negated, rest)),
            (b'\\', [literal, rest @ ..]) => {
                contains |= *literal == byte;
                inside = rest;
            }
            (low, [b'-', high, rest @ ..]) if *high != b']' => {
                contains |= (*low..=*high).contains(&byte);
                inside = rest;
            }
            (low, rest) => {
                contains |= *low == byte;
                inside = rest;
            }
        }
        first = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn patterns_match_as_in_a_shell() {
        for (pattern, name) in [
            ("*", "abc"),
            ("*.csv", "a.csv"),
            ("a?c", "abc"),
            ("[a-c]x", "bx"),
            ("[!a-c]x", "dx"),
            ("[]x]", "]"),
            ("a*b*c", "a--b--b--c"),
            (r"\*", "*"),
            ("[x", "[x"),
            ("", ""),
            ("**", ""),
            (r"[\]]", "]"),
            ("[a-]", "-"),
        ] {
            assert!(matches(pattern.as_bytes(), name.as_bytes()), "{pattern} {name}");
        }
        for (pattern, name) in
            [("*.csv", "a.cs"), ("a?c", "ac"), ("[a-c]x", "dx"), (r"\*", "a"), ("a*b", "a--bc"), ("", "a"), ("?", "")]
        {
            assert!(!matches(pattern.as_bytes(), name.as_bytes()), "{pattern} {name}");
        }
    }

    #[test]
    fn words_become_paths() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().to_str().unwrap().as_bytes();
        for name in ["b.csv", "a.csv", ".hidden.csv", "c.txt", "d/x.csv", "[1].csv"] {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        let expand = |word: &str| -> Vec<String> {
            let strip = |path: Vec<u8>| String::from_utf8_lossy(path.strip_prefix(home).unwrap_or(&path)).into_owned();
            let paths = expand("alice", home, word.as_bytes(), &mut Budget::default()).unwrap();
            paths.into_iter().map(strip).collect()
        };
        assert_eq!(expand("~/*.csv"), ["/[1].csv", "/a.csv", "/b.csv"]);
        assert_eq!(expand("~alice/*/*.csv"), ["/d/x.csv"]);
        assert_eq!(expand("~/.*"), ["/.hidden.csv"]);
        assert_eq!(expand("~/d"), ["/d"]);
        assert_eq!(expand(r"~/\[1].csv"), ["/[1].csv"]);
        assert_eq!(expand("~bob/x"), ["~bob/x"]);
        assert_eq!(expand(r"\~/x\*"), ["~/x*"]);
        assert_eq!(expand("~/*.none"), ["/*.none"], "without a match the word stays");
    }

    #[test]
    fn what_does_not_fit_is_an_error_and_not_left_out() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a", "b", "c"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
            std::fs::write(folder.path().join(name).join("file"), "").unwrap();
        }
        let home = folder.path().to_str().unwrap().as_bytes();
        let expand = |word: &str, mut budget: Budget| expand("alice", home, word.as_bytes(), &mut budget);
        // The components of the home itself are on the way.
        let above = folder.path().components().count() - 1;
        let budget = |paths: usize| Budget { paths: above + paths, bytes: MAX_BYTES };
        assert_eq!(expand("~/*", budget(3)).unwrap().len(), 3);
        assert!(matches!(expand("~/*", budget(2)), Err(WorkerError::Bound(_))));
        assert_eq!(expand("~/*/file", budget(6)).unwrap().len(), 3);
        let error = expand("~/*/file", budget(5)).unwrap_err().to_string();
        assert!(error.contains("with -r"), "{error}");
        assert!(expand("~/*", Budget { paths: 100, bytes: home.len() }).is_err());

        // All words of a command share it.
        let mut shared = budget(3);
        expand_into(&mut shared, home, "~/[ab]").unwrap();
        assert!(expand_into(&mut shared, home, "~/[ab]").is_err());
    }

    fn expand_into(budget: &mut Budget, home: &[u8], word: &str) -> Result<Vec<Vec<u8>>, WorkerError> {
        expand("alice", home, word.as_bytes(), budget)
    }

    proptest! {
        #[test]
        fn a_quoted_name_matches_itself(name in prop::collection::vec(any::<u8>(), 0..30)) {
            let pattern: Vec<u8> = name.iter().flat_map(|byte| [b'\\', *byte]).collect();
            prop_assert!(matches(&pattern, &name));
            prop_assert_eq!(unquote(&pattern), name);
        }

        #[test]
        fn any_pattern_ends(pattern in "[ab*?\\[\\]\\\\!-]{0,40}", name in "[ab]{0,60}") {
            let _ = matches(pattern.as_bytes(), name.as_bytes());
        }
    }
}
