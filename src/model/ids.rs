//! Identities of machines, disks and points, and the names people give them.

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use uuid::Uuid;

/// Namespace of ids that are derived from names, so that configuration files on three hosts agree without copying ids.
const NAMESPACE: Uuid = Uuid::from_u128(0x9d1b_6f0c_54d3_4a7e_8d0e_7469_6465_6761);

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub Uuid);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.0)
            }
        }
    };
}

id!(
    /// A protected machine.
    MachineId
);
id!(
    /// One disk of a protected machine.
    DiskId
);
id!(
    /// A recovery point.
    PointId
);

impl MachineId {
    /// The id of a machine whose configuration gives only a name.
    pub fn from_name(machine: &Name) -> Self {
        Self(Uuid::new_v5(&NAMESPACE, machine.as_str().as_bytes()))
    }
}

impl DiskId {
    /// The id of a disk whose configuration gives only a name.
    pub fn from_names(machine: &Name, disk: &Name) -> Self {
        let joined = format!("{machine}/{disk}");
        Self(Uuid::new_v5(&NAMESPACE, joined.as_bytes()))
    }
}

/// A label that is safe in paths, metric labels and certificates: 1 to 64 of `A-Z a-z 0-9 . _ -`, not starting with a dot or dash.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

/// Why a text is not a [`Name`].
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{0:?} is not a valid name: use 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit")]
pub struct NameError(String);

impl Name {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Name {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        let starts_well = text.starts_with(|c: char| c.is_ascii_alphanumeric());
        if starts_well && text.len() <= 64 && text.chars().all(legal) {
            Ok(Self(text))
        } else {
            Err(NameError(text.chars().take(80).collect()))
        }
    }
}

impl std::str::FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::try_from(text.to_owned())
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_a_folder_or_a_label_are_refused() {
        for bad in ["", "..", ".hidden", "a/b", "a b", "-x", "a\u{202e}b", "a\n", &"x".repeat(65)] {
            assert!(bad.parse::<Name>().is_err(), "{bad:?} must be refused");
        }
        assert!("web-01.site_a".parse::<Name>().is_ok());
    }

    #[test]
    fn derived_ids_depend_on_both_names() {
        let name = |s: &str| s.parse::<Name>().unwrap();
        let a = DiskId::from_names(&name("m"), &name("sda"));
        assert_eq!(a, DiskId::from_names(&name("m"), &name("sda")));
        assert_ne!(a, DiskId::from_names(&name("m"), &name("sdb")));
        assert_ne!(a, DiskId::from_names(&name("n"), &name("sda")));
    }
}
