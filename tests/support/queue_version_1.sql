BEGIN TRANSACTION;
CREATE TABLE decisions (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    item INTEGER NOT NULL REFERENCES items (id),
    verdict TEXT NOT NULL CHECK (verdict IN ('confirm', 'correct', 'reject', 'reopen')),
    answer TEXT,
    note TEXT NOT NULL,
    reviewer TEXT NOT NULL,
    created TEXT NOT NULL,
    CHECK ((verdict = 'correct') = (answer IS NOT NULL))
);
INSERT INTO "decisions" VALUES(1,1,'confirm',NULL,'sure','Ann','2026-11-30T22:35:48.248Z');
INSERT INTO "decisions" VALUES(2,2,'correct','a star','','','2026-11-30T22:35:48.249Z');
INSERT INTO "decisions" VALUES(3,3,'reject',NULL,'','','2026-11-30T22:35:48.251Z');
INSERT INTO "decisions" VALUES(4,3,'reopen',NULL,'','','2026-11-30T22:35:48.252Z');
CREATE TABLE items (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    digest TEXT NOT NULL UNIQUE,
    created TEXT NOT NULL,
    picture TEXT NOT NULL REFERENCES pictures (digest),
    question TEXT NOT NULL,
    answer TEXT NOT NULL,
    map BLOB,
    map_height INTEGER,
    map_width INTEGER,
    region TEXT,
    entropy REAL,
    probability REAL,
    score REAL,
    reason TEXT NOT NULL,
    model_name TEXT NOT NULL,
    model_fingerprint TEXT NOT NULL,
    head_fingerprint TEXT NOT NULL,
    sample_id TEXT NOT NULL,
    extra TEXT NOT NULL
);
INSERT INTO "items" VALUES(1,'5fbe404701445e638545a17cd11d4bd65aa6d6f5add2cb965445f2dad248fe8d','2026-11-30T22:35:48.136Z','d7ea716557d22a83b954a9fc55859d40210e0774eb40b4c96824721164ec58e7','what is it, 0?','a thing 0',X'000000000000803F0000004000004040000080400000A040',2,3,'[0.0, -1.0, 4.0, 4.0]',3.00000000000000044408e-01,3.33333333333333314829e-01,0.25,'The map is widely spread.','a model','0123','4567','0','{"kind": "shape"}');
INSERT INTO "items" VALUES(2,'05eae7936f8bc4fa502dcb4c2b2bac9b6734ebe3f9af39dbb80ad3afd26feb08','2026-11-30T22:35:48.218Z','01d9b232c42e7c2b73d50c591f90ee4fad6510f619c595ded042a922d44c64ee','what is it, 1?','a thing 1',X'000000000000803F0000004000004040000080400000A040',2,3,'[0.0, -1.0, 4.0, 4.0]',NULL,3.33333333333333314829e-01,NULL,'','a model','0123','4567','1','{"kind": "shape"}');
INSERT INTO "items" VALUES(3,'c28a81f30f7b257698e6e2551f06595cea9c663371a74779bd8552e97f256a23','2026-11-30T22:35:48.232Z','d7ea716557d22a83b954a9fc55859d40210e0774eb40b4c96824721164ec58e7','what is it, 2?','a thing 2',NULL,NULL,NULL,NULL,NULL,NULL,NULL,'','a model','0123','4567','2','{"kind": "shape"}');
INSERT INTO "items" VALUES(4,'73e2c69ce519519323f20a5816c884d543f73d520001f6768baab46150f45c65','2026-11-30T22:35:48.240Z','01d9b232c42e7c2b73d50c591f90ee4fad6510f619c595ded042a922d44c64ee','what is it, 3?','a thing 3',X'000000000000803F0000004000004040000080400000A040',2,3,'[0.0, -1.0, 4.0, 4.0]',7.28571428571428647558e-01,3.33333333333333314829e-01,0.5,'Ümlaut ★.','a model','0123','4567','3','{"kind": "shape"}');
CREATE TABLE pictures (
    digest TEXT PRIMARY KEY,
    width INTEGER NOT NULL,
    height INTEGER NOT NULL,
    png BLOB NOT NULL
);
INSERT INTO "pictures" VALUES('d7ea716557d22a83b954a9fc55859d40210e0774eb40b4c96824721164ec58e7',4,3,X'89504E470D0A1A0A0000000D49484452000000040000000308020000003B9639910000003249444154789C012700D8FF005E81C1D8CEEA0EA220D6D88100F7BC0F44B7E7CC4DA83C7C09011CEF41F6C6E5284E1416DAF18FC113AF666362960000000049454E44AE426082');
INSERT INTO "pictures" VALUES('01d9b232c42e7c2b73d50c591f90ee4fad6510f619c595ded042a922d44c64ee',4,3,X'89504E470D0A1A0A0000000D49484452000000040000000308020000003B9639910000003249444154789C012700D8FF00FEE32178F2BC058265A751C000BA9550F2CC17EB07F5A3E6230417D95BDF185F08EAB3CEDB1B8FF013E221E855060000000049454E44AE426082');
CREATE INDEX decisions_of_item ON decisions (item, id);
CREATE VIEW shown AS
SELECT items.*, pictures.width, pictures.height,
    CASE WHEN latest.verdict IS NULL OR latest.verdict = 'reopen' THEN 'open' ELSE latest.verdict END AS state,
    latest.id AS decision, latest.answer AS corrected, latest.note, latest.reviewer, latest.created AS decided
FROM items JOIN pictures ON pictures.digest = items.picture
LEFT JOIN decisions AS latest ON latest.id = (SELECT max(id) FROM decisions WHERE item = items.id);
CREATE TRIGGER pictures_update BEFORE UPDATE ON pictures
BEGIN SELECT RAISE(ABORT, 'the queue is append-only'); END;
CREATE TRIGGER pictures_delete BEFORE DELETE ON pictures
BEGIN SELECT RAISE(ABORT, 'the queue is append-only'); END;
CREATE TRIGGER items_update BEFORE UPDATE ON items
BEGIN SELECT RAISE(ABORT, 'the queue is append-only'); END;
CREATE TRIGGER items_delete BEFORE DELETE ON items
BEGIN SELECT RAISE(ABORT, 'the queue is append-only'); END;
CREATE TRIGGER decisions_update BEFORE UPDATE ON decisions
BEGIN SELECT RAISE(ABORT, 'the queue is append-only'); END;
CREATE TRIGGER decisions_delete BEFORE DELETE ON decisions
BEGIN SELECT RAISE(ABORT, 'the queue is append-only'); END;
CREATE TRIGGER pictures_replace BEFORE INSERT ON pictures
WHEN EXISTS (SELECT 1 FROM pictures WHERE digest = NEW.digest)
BEGIN SELECT RAISE(ABORT, 'the queue is append-only'); END;
CREATE TRIGGER items_replace BEFORE INSERT ON items
WHEN EXISTS (SELECT 1 FROM items WHERE id = NEW.id OR digest = NEW.digest)
BEGIN SELECT RAISE(ABORT, 'the queue is append-only'); END;
CREATE TRIGGER decisions_replace BEFORE INSERT ON decisions
WHEN EXISTS (SELECT 1 FROM decisions WHERE id = NEW.id)
BEGIN SELECT RAISE(ABORT, 'the queue is append-only'); END;
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('items',4);
INSERT INTO "sqlite_sequence" VALUES('decisions',4);
COMMIT;
PRAGMA application_id = 1819698801;
PRAGMA user_version = 1;
