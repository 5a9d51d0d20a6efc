//! Names of profiles: `1g.5gb`, `3g.40gb`, `1g.24gb+me.all`, `1g.24gb-me`.

/// The parts of a profile's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProfileName<'a> {
    /// Compute slices.
    pub compute: u32,
    /// Memory in GB, as NVIDIA rounds it.
    pub gigabytes: u32,
    /// What follows, sign included (`+me`, `-me`, `+gfx`); empty for a base profile.
    pub variant: &'a str,
}

impl<'a> ProfileName<'a> {
    /// Reads a name.
    pub fn parse(text: &'a str) -> Option<Self> {
        let base = text.find(['+', '-']).unwrap_or(text.len());
        let (base, variant) = text.split_at_checked(base)?;
        let (compute, memory) = base.split_once('.')?;
        Some(Self {
            compute: compute.strip_suffix('g')?.parse().ok()?,
            gigabytes: memory.strip_suffix("gb")?.parse().ok()?,
            variant,
        })
    }

    /// The name for an instance, where the driver is too old to tell it. NVIDIA's tools count memory in
    /// eighths of the GPU, rounded up, and so does this.
    pub fn derive(compute: u32, memory_mib: u64, gpu_memory_mib: u64, variant: &str) -> String {
        let eighths = (memory_mib * 8).div_ceil(gpu_memory_mib.max(1)).min(8);
        let gigabytes = (eighths * gpu_memory_mib.div_ceil(1024) + 4) / 8;
        format!("{compute}g.{gigabytes}gb{variant}")
    }

    /// Whether both name the same kind of instance of one model. Drivers disagree on how to round the
    /// memory (`3g.39gb` and `3g.40gb`), never on the rest.
    pub fn same_kind(self, other: Self) -> bool {
        let (low, high) = (self.gigabytes.min(other.gigabytes), self.gigabytes.max(other.gigabytes));
        self.compute == other.compute && self.variant == other.variant && (high - low) * 100 <= high * 3
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_made() {
        let name = ProfileName::parse("1g.24gb+me.all");
        assert_eq!(name, Some(ProfileName { compute: 1, gigabytes: 24, variant: "+me.all" }));
        assert_eq!(ProfileName::parse("1g.24gb-me").map(|name| name.variant), Some("-me"));
        for text in ["", "gpu", "1g", "1c.2g.10gb", "1g.5", "g.5gb", "é+"] {
            assert_eq!(ProfileName::parse(text), None, "{text}");
        }
        assert_eq!(ProfileName::derive(1, 4864, 40536, ""), "1g.5gb");
        assert_eq!(ProfileName::derive(2, 9856, 40536, ""), "2g.10gb");
        assert_eq!(ProfileName::derive(7, 40192, 40536, ""), "7g.40gb");
        assert_eq!(ProfileName::derive(3, 40192, 81920, "+me"), "3g.40gb+me");
    }

    #[test]
    fn drifting_names_are_one_profile_and_others_are_not() {
        let same = |a, b| match (ProfileName::parse(a), ProfileName::parse(b)) {
            (Some(a), Some(b)) => a.same_kind(b),
            _ => panic!("not names: {a}, {b}"),
        };
        assert!(same("3g.39gb", "3g.40gb"));
        assert!(same("3g.47gb", "3g.48gb"));
        assert!(same("7g.79gb", "7g.80gb"));
        assert!(!same("1g.5gb", "1g.6gb"));
        assert!(!same("1g.10gb", "1g.10gb+me"));
        assert!(!same("3g.40gb", "4g.40gb"));
        assert!(!same("1g.10gb", "1g.12gb"));
    }
}
