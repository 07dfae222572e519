//! The backup's file: lines of JSON, and behind them the SHA-256 of all that stands before.
//!
//! Owns: its writing (whole or not at all, mode 0600) and its check. Never: replaces a file. A crash here leaves a `.partial` file.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;

use ring::digest::{Context, SHA256};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use shared::vault::{self, Dir};

use super::{Error, io};

/// Format of the file.
pub const FORMAT: u32 = 1;
const MARK: &str = "sha256:";
/// Bytes of the last line.
const TRAILER: u64 = 7 + 64 + 1;
/// Longest line that is read: a row of a job with its result.
const LINE: u64 = 64 << 20;

/// A line that is no row.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// The first.
    Backup(Head),
    /// A file of the data directory.
    File {
        /// Its name there.
        name: String,
        /// What it holds.
        base64: String,
    },
    /// Rows of this table follow, each a JSON array.
    Table {
        /// Its name.
        name: String,
        /// Names of its columns, in the rows' order.
        columns: Vec<String>,
    },
    /// The last before the sum.
    End {
        /// Rows of all tables.
        rows: u64,
    },
}

/// What a backup says of itself.
#[derive(Debug, Serialize, Deserialize)]
pub struct Head {
    /// [`FORMAT`].
    pub format: u32,
    /// Of the program that made it.
    pub version: String,
    /// RFC 3339.
    pub made_at: String,
    /// The set of tables.
    pub migrations: Vec<String>,
}

/// Writes one.
pub struct Writer {
    dir: Dir,
    name: String,
    partial: String,
    file: BufWriter<File>,
    sum: Context,
}

impl Writer {
    /// Begins a file that must not exist.
    pub fn create(path: &Path) -> Result<Self, Error> {
        let shown = path.display().to_string();
        let (dir, name) = vault::open_user_dir_of(path, false).map_err(io(shown.clone()))?;
        if dir.symlink_metadata(&name).is_ok() {
            return Err(Error::Refused(format!("{shown} exists already; a backup replaces nothing")));
        }
        let partial = format!(".{name}.{}.partial", shared::ids::random_hex::<4>());
        let file = vault::create_private(&dir, &partial).map_err(io(shown))?;
        Ok(Self { dir, name, partial, file: BufWriter::new(file), sum: Context::new(&SHA256) })
    }

    /// Adds a line.
    pub fn line(&mut self, text: &str) -> Result<(), Error> {
        for part in [text.as_bytes(), b"\n"] {
            self.sum.update(part);
            self.file.write_all(part).map_err(io(self.name.clone()))?;
        }
        Ok(())
    }

    /// Adds a line that is no row.
    pub fn say(&mut self, line: &Line) -> Result<(), Error> {
        let text = serde_json::to_string(line).map_err(|e| Error::Refused(e.to_string()))?;
        self.line(&text)
    }

    /// Ends it: sum, sync, name.
    pub fn finish(mut self) -> Result<(), Error> {
        let sum = hex::encode(self.sum.clone().finish());
        let (dir, name, partial) = (&self.dir, &self.name, &self.partial);
        let file = &mut self.file;
        let ended = (|| {
            file.write_all(format!("{MARK}{sum}\n").as_bytes())?;
            file.flush()?;
            file.get_ref().sync_all()?;
            vault::rename_without_replacing(dir, partial, name)?;
            vault::sync_dir(dir)
        })();
        ended.map_err(io(self.name.clone()))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Gone already where it has its name.
        let _ = self.dir.remove_file(&self.partial);
    }
}

/// A backup whose sum was checked.
pub struct Reader {
    lines: BufReader<std::io::Take<File>>,
    /// What it says of itself.
    pub head: Head,
}

/// What stands in a line.
pub enum Item {
    /// No row.
    Line(Line),
    /// A row of the table that was named last.
    Row(Vec<Value>),
}

impl Reader {
    /// Opens a backup and checks it to its last byte.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let shown = path.display().to_string();
        let mut file = vault::open_user_file(path).map_err(io(shown.clone()))?;
        let length = file.metadata().map_err(io(shown.clone()))?.len();
        let damaged = || Error::Refused(format!("{shown} is no whole backup: its sum is missing or differs"));
        let body = length.checked_sub(TRAILER).ok_or_else(damaged)?;
        let mut sum = Context::new(&SHA256);
        let mut chunk = vec![0; 1 << 20];
        let mut left = (&mut file).take(body);
        loop {
            let read = left.read(&mut chunk).map_err(io(shown.clone()))?;
            if read == 0 {
                break;
            }
            sum.update(&chunk[..read]);
        }
        let mut trailer = String::new();
        (&mut file).take(TRAILER).read_to_string(&mut trailer).map_err(|_| damaged())?;
        if trailer != format!("{MARK}{}\n", hex::encode(sum.finish())) {
            return Err(damaged());
        }
        file.seek(SeekFrom::Start(0)).map_err(io(shown.clone()))?;
        let mut lines = BufReader::new(file.take(body));
        let head = match next(&mut lines)? {
            Some(Item::Line(Line::Backup(head))) if head.format == FORMAT => head,
            Some(Item::Line(Line::Backup(head))) => {
                return Err(Error::Refused(format!("{shown} has format {}; this version reads {FORMAT}", head.format)));
            }
            _ => return Err(Error::Refused(format!("{shown} is no backup of HyperSDK"))),
        };
        Ok(Self { lines, head })
    }

    /// The next line; nothing at the end.
    pub fn read(&mut self) -> Result<Option<Item>, Error> {
        next(&mut self.lines)
    }
}

fn next(lines: &mut impl BufRead) -> Result<Option<Item>, Error> {
    let mut text = String::new();
    lines.take(LINE).read_line(&mut text).map_err(io("the backup"))?;
    if text.is_empty() {
        return Ok(None);
    }
    let wrong = |e: serde_json::Error| Error::Refused(format!("the backup holds a line that cannot be read: {e}"));
    Ok(Some(if text.starts_with('[') {
        Item::Row(serde_json::from_str(&text).map_err(wrong)?)
    } else {
        Item::Line(serde_json::from_str(&text).map_err(wrong)?)
    }))
}
