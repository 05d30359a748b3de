// config.h: the hyper-parameters of a model file.
#pragma once

#include "model.h"

// The Config of this JSON object, whose keys docs/model-file.md lists. Throws Error with one line that names the key,
// its value and what it must be; a key that is not known is refused too.
Config read_config(const std::string& path, const std::string& text);
